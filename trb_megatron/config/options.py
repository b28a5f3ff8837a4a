"""Every option of a run with its default, in sections; a docstring below each says what it does.

Those of prompts and problems are in `data_options`. `reading` makes a `Config` of a file,
`conflicts` says what cannot be combined. Relative paths are relative to the current directory.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trb_megatron.config.data_options import DataConfig, EvaluationSet, JobDataConfig
from trb_megatron.config.values import (
    ConfigPath,
    Count,
    CountFromZero,
    Flag,
    FP8Recipe,
    Fraction,
    GraderName,
    LossName,
    Momentum,
    Name,
    NonNegative,
    Section,
    SetName,
    Temperature,
    TemperatureOrGreedy,
    auto_or_between,
    between,
    refuse_duplicates,
    zero_or_between,
)


class JobRunConfig(Section):
    """Where a run lives and which random numbers it draws."""

    dir: ConfigPath | None = None
    """Used for training alone."""
    seed: Annotated[int, between(0, 2**63 - 1)] = 0
    """Seed of the prompt order and of every token that is sampled."""


class RunConfig(JobRunConfig):
    """Where a run lives and which random numbers it draws."""

    dir: ConfigPath
    """Folder of the run: configuration, metrics, checkpoints, export. A run that is started again
    with the same folder resumes from its newest checkpoint."""


class ModelConfig(Section):
    """A model as a Hugging Face checkpoint folder."""

    path: ConfigPath
    """Hugging Face checkpoint folder: `config.json`, safetensors weights, tokenizer."""


def _refuse_expert_parallelism(size: int) -> int:
    if size != 1:
        raise ValueError(
            "expert parallelism is not built yet; tensor parallelism cuts the experts, too: raise "
            "parallel.tensor_model_parallel_size instead"
        )
    return size


class ParallelConfig(Section):
    """How both models are spread over the ranks."""

    tensor_model_parallel_size: Count = 1
    """Ranks that share each layer. Both models must be divisible by it; an error lists the sizes
    that fit. What tensor x pipeline size leaves of the ranks is data parallel."""
    pipeline_model_parallel_size: Count = 1
    """Stages that the layers are cut into."""
    sequence_parallel: Flag = False
    """Split the activations between layers over the tensor-parallel ranks, by tokens."""
    expert_model_parallel_size: Annotated[Count, AfterValidator(_refuse_expert_parallelism)] = 1
    """Only 1 is built. The experts of a mixture are cut over the tensor-parallel ranks."""
    timeout_minutes: Annotated[float, between(0.02, 43_200)] = 30.0
    """Minutes that a collective operation may take. After that the job ends with an error."""


class TrainingConfig(Section):
    """The task, its length, and how it fits into memory."""

    task: Literal["distill", "supervised"] = "distill"
    """`distill`: learn from the teacher on sampled responses; `supervised`: imitate the responses
    of `data.response_column`."""
    steps: Count = 400
    """Steps of the run, each with one optimizer update."""
    prompts_per_step: Annotated[int, between(1, 2**20)] = 64
    """Prompts of a step, over all data-parallel replicas."""
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Number format of both models; `fp8`: the layers' matrix products, with all else as in
    `bf16`."""
    fp8_recipe: FP8Recipe = "tensorwise"
    """How FP8 scales are found. `tensorwise` needs the least hardware and keeps nothing between
    passes, so that rollouts and resumes leave no trace."""
    max_tokens_per_microbatch: Count = 16384
    """Prompt and response tokens that one forward and backward pass of a replica takes. A longer
    sequence gets a pass of its own."""
    teacher_hidden_device: Literal["device", "host"] = "device"
    """Where the teacher's hidden states wait for the loss; `host` (pinned memory) makes room on a
    GPU."""
    recompute_activations: Flag = False
    """Compute the student's layers a second time in the backward pass instead of keeping their
    activations."""
    max_nonfinite_steps: CountFromZero = 0
    """Steps with a NaN or infinity that the run skips, without an update, before it stops; 0: it
    stops at the first."""


AUTO_PAGE_TOKENS = 64
AUTO_CACHE_SHARE = 0.8
"""Of a GPU's free memory."""
AUTO_DRAFT_TOKENS = 16
"""The most that `rollout.draft_tokens: auto` chooses."""
MOST_DRAFT_TOKENS = 255


class RolloutConfig(Section):
    """How responses are sampled during training."""

    rollouts_per_prompt: Annotated[int, between(1, 2**16)] = 4
    """Responses that are sampled for each prompt."""
    max_response_tokens: Count = 7168
    """Tokens after which a response is cut off."""
    temperature: TemperatureOrGreedy = 1.0
    """Temperature of both models when tokens are sampled; 0: greedy."""
    stop_ids: (
        Annotated[tuple[CountFromZero, ...], Field(min_length=1), AfterValidator(refuse_duplicates)]
        | None
    ) = None
    """Token ids that end a response, for both models; `null`: those of each model's
    `generation_config.json`, or else `config.json`."""
    max_sequences: Annotated[int, between(1, 2**16)] = 256
    """Sequences that one data-parallel replica generates at a time (cache slots)."""
    page_tokens: Annotated[Literal["auto"] | int, auto_or_between(1, 2**16)] = "auto"
    """Tokens of one page of the key/value cache; `auto`: 64, or the 256 that flash-attention 2
    needs."""
    cache_gb: Annotated[float, between(1e-9, 1e6)] | None = None
    """GB (10^9 bytes) of each rank for the key/value caches of both models; `null`: as much as all
    slots can ever need, but at most 80 % of what is free."""
    max_prefill_tokens: Count = 16384
    """Prompt tokens of one forward pass when sequences enter the cache."""
    cuda_graphs: Flag = True
    """Record the student's single-token steps as CUDA graphs, on GPUs with flash-attention and one
    pipeline stage."""
    draft_tokens: Annotated[Literal["auto"] | int, auto_or_between(0, MOST_DRAFT_TOKENS)] = "auto"
    """Tokens that the student proposes per call of the teacher; 0: token by token; `auto`: by
    costs that are measured when the run first starts, at the numbers of sequences that a step has.
    Never changes a token."""
    keep_teacher_hidden: Flag = True
    """Keep the teacher's hidden states from the rollouts for the loss, which then runs no
    teacher."""

    @property
    def max_positions(self) -> int:
        """Positions of a round at most: the drafts, and the one behind them.

        A sequence may pass its longest length by as many before its round is cut.
        """
        most_drafts = AUTO_DRAFT_TOKENS if self.draft_tokens == "auto" else self.draft_tokens
        return most_drafts + 1


class BehaviorConfig(Section):
    """The policy that rollouts are sampled from, and for how long it may leave the student."""

    policy: Literal["trb", "skd", "teacher"] = "trb"
    """`trb`: nearest the teacher within a KL budget of the student; `skd`: the student's draw, or
    the teacher's where the teacher finds it unlikely; `teacher`: the teacher's own."""
    warmup_steps: CountFromZero = 50
    """Steps with this policy, counted from 0; from this step on rollouts are the student's own."""
    kl_budget: NonNegative = 0.01
    """`trb`: budget in nats per token at step 0; 0: plain on-policy distillation."""
    schedule: Literal["linear", "constant"] = "linear"
    """`trb`: `linear` lowers the budget to 0 over the warmup; `constant` keeps it until the warmup
    ends."""
    skd_top_k: Count = 25
    """`skd`: number of the teacher's likeliest tokens; the student's draw is kept if it is one of
    them."""
    skd_temperature: Temperature = 1.0
    """`skd`: temperature of the teacher's draw that replaces another."""


class LossConfig(Section):
    """The training loss and its parameters (names as in `trb_megatron.loss.rules`)."""

    name: LossName = "reverse_kl_topk"
    """The loss."""
    top_k: Count = 16
    """Size of the student's top-k, for the losses on it and for the metrics of every loss."""
    temperature: Temperature = 1.0
    """Divides the logits of both models in the loss."""
    jsd_weight: Annotated[float, between(0.001, 0.999)] = 0.5
    """`jsd`: weight of the teacher in the mixture; 0 and 1 would give zero loss."""
    veto_coef: Fraction = 0.0
    """`veto`: coefficient at step 0; it decays linearly to 0 over the run."""
    workspace_mb: Annotated[int, between(1, 10**6)] = 512
    """MB (10^6 bytes) for the logits of a chunk of tokens. More is a little faster; results stay
    the same."""


class OptimizerConfig(Section):
    """AdamW with a cosine warmup, then a constant learning rate."""

    lr: Annotated[float, between(1e-12, 1)] = 1e-5
    """Learning rate after its warmup."""
    beta1: Momentum = 0.9
    """AdamW's decay rate of the mean of gradients."""
    beta2: Momentum = 0.999
    """AdamW's decay rate of the mean of squared gradients."""
    eps: Annotated[float, between(1e-20, 1)] = 1e-8
    """AdamW's term in the denominator; far less is 0 in fp32."""
    weight_decay: NonNegative = 0.01
    """AdamW's decoupled weight decay, multiplied with the learning rate."""
    clip_grad: Annotated[float, Field(strict=True), zero_or_between(1e-6, 1e6)] = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it; 0: no clipping."""
    warmup_steps: CountFromZero = 15
    """Steps over which the learning rate rises to `lr`, as a half cosine."""
    distributed: Flag = True
    """Shard master weights and optimizer state over the data-parallel ranks."""


class CheckpointConfig(Section):
    """How often the run is saved, how many saves stay, and whether it ends in an export."""

    every: Count = 50
    """Steps between saves; the last step is always saved."""
    keep: Count = 2
    """Newest saves that stay; older ones are deleted."""
    export_hf: Flag = True
    """Write the student to `RUN/hf` as a Hugging Face checkpoint after the last step."""


AUTO_EVALUATION_TOKENS = 8192
"""The most that `evaluation.max_response_tokens: auto` chooses."""


class EvaluationConfig(Section):
    """When and how the student's answers are graded."""

    sets: dict[SetName, EvaluationSet] = {}  # noqa: RUF012 - pydantic copies it
    """Problem sets by name; the name appears in the metrics, as in `eval/NAME/pass@1`."""
    every: Count = 20
    """Steps between evaluations."""
    at_start: Flag = True
    """Evaluate before the first step."""
    at_end: Flag = True
    """Evaluate after the last step."""
    samples: Annotated[int, between(1, 2**16)] = 1
    """Responses per problem."""
    pass_at: Annotated[
        tuple[Count, ...], Field(min_length=1), AfterValidator(refuse_duplicates)
    ] = (1,)
    """Values of k for which pass@k is reported, each at most `samples`."""
    temperature: TemperatureOrGreedy = 1.0
    """Temperature of the student; 0: greedy."""
    max_response_tokens: Annotated[Literal["auto"] | int, auto_or_between(1, 2**31 - 1)] = "auto"
    """Tokens after which a response is cut off; `auto`: 8192, or what the student's positions leave
    behind the longest problem."""


class RewardsConfig(Section):
    """The processes that grade answers."""

    workers: Annotated[int, between(1, 1024)] = 2
    """Grading processes of each data-parallel replica."""
    timeout_s: Annotated[float, between(0.01, 86_400)] = 10.0
    """Seconds for one answer. An answer that takes longer scores 0."""
    grader: GraderName | None = None
    """A function of your own that grades, as `module:function`; `null`: math-verify and the rules
    of [Evaluation](evaluation.md#how-it-grades)."""


class LoggingConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: Flag = True
    """Write TensorBoard files to `RUN/tensorboard`."""
    wandb_project: Name | None = None
    """Weights & Biases project that gets the metrics; `null`: none."""


class JobConfig(Section):
    """The configuration of a job that runs a student: an evaluation, or training (`Config`)."""

    run: JobRunConfig = JobRunConfig()
    """Where the run lives."""
    student: ModelConfig
    """The model that is trained."""
    teacher: ModelConfig | None = None
    """The model that teaches; `null` only with `training.task=supervised`."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of both models over the ranks."""
    data: JobDataConfig = JobDataConfig()
    """The prompts."""
    training: TrainingConfig = TrainingConfig()
    """Steps, precision and memory."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling of responses in training."""
    behavior: BehaviorConfig = BehaviorConfig()
    """The policy that samples the responses."""
    loss: LossConfig = LossConfig()
    """The loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saves and export."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """pass@1 and pass@k on problem sets."""
    rewards: RewardsConfig = RewardsConfig()
    """Grading processes."""
    logging: LoggingConfig = LoggingConfig()
    """TensorBoard and Weights & Biases."""

    def system_prompt_of(self, name: str) -> str | None:
        """The system prompt of an evaluation set."""
        prompt = self.evaluation.sets[name].system_prompt
        return self.data.system_prompt if prompt == "auto" else prompt

    def longest_problem(self, name: str) -> int:
        """Tokens of a problem of an evaluation set beyond which it counts as wrong."""
        tokens = self.evaluation.sets[name].max_prompt_tokens
        return self.data.max_prompt_tokens if tokens == "auto" else tokens


class Config(JobConfig):
    """The whole configuration of a training run, which no other job needs so much of."""

    run: RunConfig
    """Where the run lives."""
    data: DataConfig
    """The prompts."""

    @property
    def is_distilling(self) -> bool:
        """Whether there is a teacher to learn from; else the responses are given."""
        return self.training.task == "distill"

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher takes part in the rollouts of some steps."""
        has_guidance = self.behavior.policy != "trb" or self.behavior.kl_budget > 0
        return self.is_distilling and has_guidance
