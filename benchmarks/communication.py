"""What the ranks of a step tell each other: formulas, and their values at 8, 64 and 512 GPUs.

    python -m benchmarks.communication      (from the root of the repository; needs no GPU)

Prints the tables of "Communication per step" in the documentation. Each formula gives the bytes
that one rank sends (and receives) in a ring: of n ranks, each sends (n - 1) times what it
contributes to an all-gather, (n - 1) / n of what a reduce-scatter adds up, and twice that in an
all-reduce.
`tests/distributed/test_communication.py` compares the formulas with what real ranks send.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

NVLINK_BYTES_PER_S = 450e9
"""Of one H100, in each direction: 900 GB/s in both (NVIDIA, H100 data sheet)."""
NETWORK_BYTES_PER_S = 50e9
"""Of one 400 Gb/s adapter; each GPU has its own."""
GPUS_PER_NODE = 8

# Bytes of a number.
BF16, FP32, FP64 = 2, 4, 8
# A draw on two levels: maximum and mass, score and number of the best chunk between the boundaries
# of a shard, masses of the first and the last; then score, id and logit of the best id.
_SAMPLE = (6 + 3) * FP64


# ---------------------------------------------------------------- on vocabulary shards


def blend_bytes(rows: int, evaluations: int, tp_size: int) -> int:
    """The blend solver: 12 moments of each row, and 6 sums for each β that is tried on a row."""
    return (tp_size - 1) * FP64 * (12 * rows + 6 * evaluations)


def draw_bytes(rows: int, rejected: int, tp_size: int) -> int:
    """Draw by maximal coupling: the proposal's logprobs in both policies; where it is rejected,
    mass of the residual and a sample of it."""
    return (tp_size - 1) * (2 * FP32 * rows + (FP64 + _SAMPLE) * rejected)


def record_bytes(rows: int, tp_size: int) -> int:
    """Logprobs of the drawn token in student, teacher and behavior policy."""
    return (tp_size - 1) * 3 * FP32 * rows


def proposal_bytes(rows: int, tp_size: int) -> int:
    """A sample of the student."""
    return (tp_size - 1) * _SAMPLE * rows


def stop_bytes(rows: int, num_ids: int, tp_size: int) -> int:
    """Logits of a model's stop ids, which are merged into one."""
    return (tp_size - 1) * FP32 * num_ids * rows


def topk_loss_bytes(tokens: int, top_k: int, tp_size: int) -> int:
    """Forward of a loss on the top-k support: of both models 3 sums and k candidates with their
    ids, and the teacher's logits of the student's k."""
    return (tp_size - 1) * tokens * (2 * FP64 * (3 + 2 * top_k) + FP32 * top_k)


def vocabulary_bytes(rows: int, vocab_size: int, tp_size: int) -> int:
    """What is never sent: the whole rows of both models' logits, in bf16."""
    return (tp_size - 1) * 2 * BF16 * rows * vocab_size // tp_size


# ---------------------------------------------------------------- in the models


def forward_bytes(
    tokens: int, num_layers: int, hidden_size: int, tp_size: int, width: int = BF16
) -> int:
    """Forward of a model: two all-reduces of the hidden states in each layer, one of the embedding.

    With sequence parallelism each is a reduce-scatter and an all-gather, which is as much.
    """
    return 2 * (2 * num_layers + 1) * _half(tokens, hidden_size, tp_size, width)


def backward_bytes(
    tokens: int,
    num_layers: int,
    hidden_size: int,
    tp_size: int,
    *,
    sequence_parallel: bool,
    recompute: bool,
    width: int = BF16,
) -> int:
    """Backward of a model: two all-reduces in each layer.

    With sequence parallelism the inputs of the layer's two column-parallel products are gathered
    again, and so is the gradient of the embedding; with recomputation comes each layer's forward.
    """
    halves = 4 * num_layers
    if sequence_parallel:
        halves += 2 * num_layers + 1
    if recompute:
        halves += 4 * num_layers
    return halves * _half(tokens, hidden_size, tp_size, width)


def shared_group_bytes(
    tokens: int, num_layers: int, num_qkv_rows: int, tp_size: int, passes: int, width: int = BF16
) -> int:
    """Where ranks share a query group: queries, keys and values of all heads, in each layer.

    Each forward, backward and recomputation is a pass: an all-gather, or a reduce-scatter.
    """
    return passes * num_layers * _half(tokens, num_qkv_rows, tp_size, width)


def loss_gradient_bytes(tokens: int, hidden_size: int, tp_size: int, width: int = BF16) -> int:
    """The fused loss: one all-reduce of the gradient of the hidden states."""
    return 2 * _half(tokens, hidden_size, tp_size, width)


def norm_gradient_bytes(num_parameters: int, tp_size: int) -> int:
    """With sequence parallelism, once a step: fp32 gradients of the norms, all-reduced."""
    return 2 * (tp_size - 1) * num_parameters * FP32 // tp_size


def pipeline_bytes(tokens: int, hidden_size: int, width: int = BF16) -> int:
    """From one stage to the next, and as much back in the backward; 1 / tp with sequence
    parallelism."""
    return tokens * hidden_size * width


def gradient_bytes(num_parameters: int, dp_size: int, width: int = BF16) -> int:
    """Reduce-scatter of fp32 gradients and all-gather of the updated parameters of one rank."""
    return (dp_size - 1) * num_parameters * (FP32 + width) // dp_size


def _half(tokens: int, hidden_size: int, tp_size: int, width: int) -> int:
    """An all-gather or reduce-scatter of hidden states: half an all-reduce."""
    return (tp_size - 1) * tokens * hidden_size * width // tp_size


# ---------------------------------------------------------------- the paper's setting


@dataclass(frozen=True)
class Model:
    """Sizes of a model."""

    num_layers: int
    hidden_size: int
    num_parameters: int


@dataclass(frozen=True)
class Setting:
    """A step of one model replica (of `tp_size` GPUs), at its longest.

    Attributes:
        prompts: prompts of a replica; constant when the number of GPUs grows.
        positions: tokens that the teacher scores in a round.
        acceptance: chance that a proposal is accepted; the least at a budget of 0.01 nats.
        evaluations: values of β that the solver tries on a row, on average (benchmarks/solver.py).
        student_stops, teacher_stops: stop ids of the models.
    """

    student: Model = Model(num_layers=28, hidden_size=2048, num_parameters=1_720_574_976)
    teacher: Model = Model(num_layers=36, hidden_size=4096, num_parameters=8_190_735_360)
    vocab_size: int = 151_936
    tp_size: int = 2
    prompts: int = 16
    rollouts_per_prompt: int = 4
    prompt_tokens: int = 1024
    response_tokens: int = 7168
    top_k: int = 16
    positions: int = 9
    acceptance: float = 1 - (0.01 / 2) ** 0.5
    evaluations: float = 1.06
    student_stops: int = 1
    teacher_stops: int = 2

    @property
    def rollouts(self) -> int:
        return self.prompts * self.rollouts_per_prompt

    @property
    def loss_tokens(self) -> int:
        return self.rollouts * self.response_tokens

    @property
    def all_tokens(self) -> int:
        return self.rollouts * (self.prompt_tokens + self.response_tokens)

    @property
    def tokens_per_round(self) -> float:
        """(1 - a^G) / (1 - a), Leviathan et al., arXiv 2211.17192, equation 1."""
        return (1 - self.acceptance**self.positions) / (1 - self.acceptance)

    @property
    def scored_rows(self) -> int:
        """Positions that student and teacher look at for all responses of a warmup step."""
        return round(self.loss_tokens * self.positions / self.tokens_per_round)


class Traffic(NamedTuple):
    """What one GPU sends in a step."""

    name: str
    warmup: int
    """In a step whose rollouts are blended."""
    later: int
    """In a step whose rollouts are the student's."""


def tensor_parallel_traffic(step: Setting) -> Iterator[Traffic]:
    """Inside of a replica, over NVLink; the same for any number of GPUs."""
    rows, tp, loss_tokens = step.scored_rows, step.tp_size, step.loss_tokens
    student, teacher = step.student, step.teacher
    prefilled = step.prompts * step.prompt_tokens

    def forward(tokens: int, model: Model) -> int:
        return forward_bytes(tokens, model.num_layers, model.hidden_size, tp)

    yield Traffic("blend", blend_bytes(rows, round(rows * step.evaluations), tp), 0)
    rejected = round(rows * (1 - step.acceptance))
    num_stops = step.student_stops + step.teacher_stops
    yield Traffic(
        "proposals, draws and their records",
        proposal_bytes(rows, tp)
        + stop_bytes(rows, step.student_stops, tp)
        + stop_bytes(rows, num_stops, tp)
        + draw_bytes(rows, rejected, tp)
        + record_bytes(rows, tp),
        proposal_bytes(loss_tokens, tp) + stop_bytes(loss_tokens, step.student_stops, tp),
    )
    yield Traffic(
        "layers of the student in rollouts",
        forward(rows + prefilled, student),
        forward(loss_tokens + prefilled, student),
    )
    yield Traffic(
        "layers of the teacher",
        forward(rows + prefilled, teacher),
        forward(step.all_tokens, teacher),
    )
    layers = (student.num_layers, student.hidden_size, tp)
    training = forward_bytes(step.all_tokens, *layers) + backward_bytes(
        step.all_tokens, *layers, sequence_parallel=True, recompute=True
    )
    yield Traffic("layers of the student in training", training, training)
    loss = topk_loss_bytes(loss_tokens, step.top_k, tp) + stop_bytes(loss_tokens, num_stops, tp)
    yield Traffic("loss", loss, loss)
    gradient = loss_gradient_bytes(loss_tokens, student.hidden_size, tp)
    yield Traffic("gradient of the loss", gradient, gradient)


class GradientTraffic(NamedTuple):
    """What one GPU sends of gradients and parameters in a step."""

    dp_size: int
    nvlink: int
    network: int

    @property
    def seconds(self) -> float:
        return max(self.nvlink / NVLINK_BYTES_PER_S, self.network / NETWORK_BYTES_PER_S)


def data_parallel_traffic(step: Setting, num_gpus: int) -> GradientTraffic:
    """Between replicas: the m members of a group in one node form m rings, of which each leaves the
    node at another of them, so that one hop in m is on the network."""
    dp_size = num_gpus // step.tp_size
    total = gradient_bytes(step.student.num_parameters // step.tp_size, dp_size)
    members = min(dp_size, GPUS_PER_NODE // step.tp_size)
    network = 0 if dp_size == members else total // members
    return GradientTraffic(dp_size, total - network, network)


# ---------------------------------------------------------------- the tables


def main() -> None:
    """Print the tables of the page."""
    step = Setting()
    print(f"{step.loss_tokens:,} response tokens, {step.scored_rows:,} scored rows per replica\n")
    print("| within a replica | MB, warmup | ms | MB, later | ms |\n|-|-|-|-|-|")
    for name, *amounts in tensor_parallel_traffic(step):
        print(f"| {name} | " + " | ".join(map(_show, amounts)) + " |")
    print("\n| never sent: whole rows of logits | MB | ms | times as much |\n|-|-|-|-|")
    blend, *_, loss, _ = tensor_parallel_traffic(step)
    for what, rows, sent in (
        ("blend", step.scored_rows, blend.warmup),
        ("loss", step.loss_tokens, loss.warmup),
    ):
        whole = vocabulary_bytes(rows, step.vocab_size, step.tp_size)
        print(f"| for the {what} | {_show(whole)} | {whole / sent:,.0f} |")
    print("\n| GPUs | prompts | DP | gradients: MB over NVLink | MB over network | ms |")
    print("|-|-|-|-|-|-|")
    for num_gpus in (8, 64, 512):
        dp_size, nvlink, network = traffic = data_parallel_traffic(step, num_gpus)
        print(
            f"| {num_gpus} | {step.prompts * dp_size:,} | {dp_size} | {nvlink / 1e6:,.0f} | "
            f"{network / 1e6:,.0f} | {1e3 * traffic.seconds:.1f} |"
        )


def _show(num_bytes: int) -> str:
    """Two columns: megabytes, and milliseconds over NVLink."""
    return f"{num_bytes / 1e6:,.0f} | {1e3 * num_bytes / NVLINK_BYTES_PER_S:,.1f}"


if __name__ == "__main__":
    main()
