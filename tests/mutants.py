"""Mutants: small mistakes in the code, each of which the tests must notice.

    python -m tests.mutants [NAME ...] [--check-clean]

A mutant replaces a text that occurs once in the sources, wherever that is, so it survives a move of
the code to another file. A copy of the working tree gets one mutant at a time and runs a few fast
tests, which must fail. `tests/test_mutants.py` checks that the list fits the sources.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("trb_megatron", "checkpoints_tools")
TIMEOUT_S = 400
MARKERS = "not slow and not gpu and not multi_gpu and not real"

KILLED, SURVIVED, COULD_NOT_RUN = "killed", "SURVIVED", "could not run"


@dataclass(frozen=True)
class Mutant:
    """A mistake, and the tests that notice it.

    Attributes:
        name: says what is wrong.
        claim: what does not hold any more; the first words of a row of the table of claims in
            docs/testing.md, or another promise.
        old: a text that occurs once in all files of `SOURCES` together; without the indentation of
            its first line.
        new: what takes its place.
        tests: names of files below tests/, wherever they lie there, with or without a function
            (`test_loss.py::test_metrics`).
    """

    name: str
    claim: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS: tuple[Mutant, ...] = (
    # docs/testing.md, "Claims and their tests", row by row
    Mutant(
        name="log-ratio-of-a-shard-re-based-the-wrong-way",
        claim="blend and losses against golden vectors",
        old="shift_RN = torch.where(shard.sum > 0, offset_t_RN - offset_RN, 0.0)",
        new="shift_RN = torch.where(shard.sum > 0, offset_RN - offset_t_RN, 0.0)",
        tests=("test_golden.py::test_blend",),
    ),
    Mutant(
        name="solver-searches-on-this-shard-alone",
        claim="blend and losses against golden vectors",
        old="all_gather(torch.cat(partials, dim=1).permute(1, 2, 0), tp_group)",
        new="all_gather(torch.cat(partials, dim=1).permute(1, 2, 0), None)",
        tests=("test_golden.py::test_blend",),
    ),
    Mutant(
        name="every-rank-of-the-world-asked",
        claim="the mathematics on shards of 8 and 16 ranks",
        old="dist.all_gather(parts, partial, group=tp_group)",
        new="dist.all_gather(parts, partial)",
        tests=("test_moments.py::test_moments_of_the_first_round",),
    ),
    Mutant(
        name="shards-counted-over-the-world",
        claim="the mathematics on shards of 8 and 16 ranks",
        old="dist.get_rank(tp_group) * local_width",
        new="dist.get_rank() * local_width",
        tests=("test_sampling.py::test_equals_the_dense_rule_at_any_number_of_ranks",),
    ),
    Mutant(
        name="sign-in-the-close-branch-of-the-jsd",
        claim="values and gradients of every loss from hidden states",
        old="torch.where(is_close_NU, close_NU - ratio_NU, q_ratio_NU)",
        new="torch.where(is_close_NU, close_NU + ratio_NU, q_ratio_NU)",
        tests=("test_fused_loss.py::test_values_and_gradients",),
    ),
    Mutant(
        name="sequence-parallel-norm-gradient-not-summed",
        claim="gradient of every parameter at TP 1, 2 × PP 1, 2",
        old="self.weight.sequence_parallel = config.sequence_parallel",
        new="self.weight.sequence_parallel = False",
        tests=("test_gradients.py::test_every_gradient_is_that_of_the_plain_way",),
    ),
    Mutant(
        name="each-rank-reads-the-first-query-groups",
        claim="logits equal transformers' within 1e-4",
        old="tensor[first * rows : stop * rows]",
        new="tensor[: (stop - first) * rows]",
        tests=("test_hf_weights.py::test_mapping_reads_shards_and_joins_them_exactly",),
    ),
    Mutant(
        name="each-rank-reads-the-first-rows-of-a-shared-query-group",
        claim="HF → Megatron → HF is bit-identical",
        old="num_before = part.start - first * group_size",
        new="num_before = 0",
        tests=("test_hf_weights.py::test_grouped_qkv_layout_is_megatrons",),
    ),
    Mutant(
        name="ranks-of-a-query-group-draft-with-its-first-queries",
        claim="same tokens, loss and gradient norm at every layout",
        old="group_N1X.narrow(-1, rank_in_group * num_features, num_features)",
        new="group_N1X.narrow(-1, 0, num_features)",
        tests=(
            "test_rollout.py::test_same_tokens_at_every_layout_number_of_slots_and_draft_length",
        ),
    ),
    Mutant(
        name="gathered-projections-planned-as-if-cut",
        claim="the plan of a run has the parameters and bytes of real ranks",
        old="projected = float(model.num_qkv_rows)",
        new="projected = model.num_qkv_rows / self.tp_size",
        tests=("test_plan.py::test_activations_of_a_layer_by_hand",),
    ),
    Mutant(
        name="query-groups-that-ranks-can-neither-own-nor-share",
        claim="a layout that a model cannot be cut into is refused",
        old="if groups % tp_size != 0 and tp_size % groups != 0:",
        new="if groups > tp_size and groups % tp_size != 0:",
        tests=("test_hf_config.py::test_sizes_that_fit_a_model_are_listed",),
    ),
    Mutant(
        name="keys-counted-from-the-start-of-a-round",
        claim="same tokens, loss and gradient norm at every layout",
        old="position_keys(key_S1, first_S1 + torch.arange(num_positions))",
        new="position_keys(key_S1, 0 * first_S1 + torch.arange(num_positions))",
        tests=(
            "test_rollout.py::test_same_tokens_at_every_layout_number_of_slots_and_draft_length",
        ),
    ),
    Mutant(
        name="every-prefill-chunk-has-the-first-tokens",
        claim="rollouts are the same after preemption",
        old="for token_id in sequence.token_ids[sequence.num_cached :][:count]",
        new="for token_id in sequence.token_ids[:count]",
        tests=("test_engine.py::test_same_tokens",),
    ),
    Mutant(
        name="no-taylor-step-settles-a-row",
        claim="the solver reads a row's logits at most 8 times",
        old="is_close_M = error_M1[:, 0] <= _RELATIVE_TOLERANCE * target_M",
        new="is_close_M = error_M1[:, 0] <= 1e-9 * target_M",
        tests=("test_solver_costs.py::test_random_cases_need_few_passes",),
    ),
    Mutant(
        name="cached-keys-rotated-the-other-way",
        claim="greedy rollouts equal a loop that recomputes everything",
        old="sin_N111d[..., :half].neg_()",
        new="sin_N111d[..., half:].neg_()",
        tests=("test_rollout.py::test_greedy_equals_a_loop_that_recomputes_everything",),
    ),
    Mutant(
        name="residual-shares-the-noise-of-the-draft",
        claim="sampling frequencies follow μ",
        old="key_N[rows_M], Purpose.RESIDUAL, tp_group=tp_group",
        new="key_N[rows_M], Purpose.DRAFT, tp_group=tp_group",
        tests=(
            "test_sequences.py::test_frequencies_of_all_responses_are_exact",
            "test_coupling.py::test_draws_follow_the_behavior_policy",
        ),
    ),
    Mutant(
        name="chunk-and-id-of-one-number-share-noise",
        claim="a draw on two levels equals its dense rule",
        old="decision = purpose + len(Purpose) * (1 + level)",
        new="decision = purpose + len(Purpose)",
        tests=("test_sampling.py::test_samples_follow_the_softmax",),
    ),
    Mutant(
        name="first-part-of-a-cut-chunk-stands-for-all-of-it",
        claim="a draw on two levels equals its dense rule",
        old="mass_RN[origin] += head_RN[rank]",
        new="mass_RN[origin] += 0 * head_RN[rank]",
        tests=("test_sampling.py::test_equals_the_dense_rule_at_any_number_of_ranks",),
    ),
    Mutant(
        name="part-of-a-cut-chunk-given-to-the-shard-before",
        claim="the mathematics on shards of 8 and 16 ranks",
        old="origin = start // CHUNK_WIDTH * CHUNK_WIDTH // shard.width",
        new="origin = rank - (start % CHUNK_WIDTH != 0)",
        tests=("test_sampling.py::test_samples_on_shards_follow_the_softmax",),
    ),
    Mutant(
        name="kept-hidden-states-in-the-order-of-rounds",
        claim="hidden states kept from the rollouts",
        old='columns["teacher_hidden"] = hidden_NH[order_N.to(hidden_NH.device)]',
        new='columns["teacher_hidden"] = hidden_NH',
        tests=("test_trainer.py::test_hidden_states_kept_from_rollouts_give_the_same_update",),
    ),
    Mutant(
        name="blending-with-a-budget-of-zero",
        claim="ε₀ = 0 equals, bit for bit,",
        old='self.behavior.policy != "trb" or self.behavior.kl_budget > 0',
        new='self.behavior.policy != "trb" or self.behavior.kl_budget >= 0',
        tests=("test_trainer.py::test_zero_budget_is_plain_distillation_bit_for_bit",),
    ),
    Mutant(
        name="second-moments-of-adamw-not-restored",
        claim="stop and resume is bit-identical",
        old='for name in ("exp_avg", "exp_avg_sq"):',
        new='for name in ("exp_avg",):',
        tests=("test_checkpoint.py::test_resumed_run_is_bit_identical",),
    ),
    Mutant(
        name="keys-from-wrong-rows-of-a-query-group",
        claim="HF → Megatron → HF is bit-identical",
        old="starts = [group * group_size + sum(rows[:j])",
        new="starts = [group * group_size + j * rows[j]",
        tests=("test_conversion.py::test_round_trip_is_exact",),
    ),
    Mutant(
        name="layers-that-stay-keep-their-numbers",
        claim="a checkpoint with layers dropped is, bit for bit,",
        old="new_number = {old: new for new, old in enumerate(kept)}",
        new="new_number = {old: old for new, old in enumerate(kept)}",
        tests=("test_drop_layers.py::test_equals_transformers_model_without_the_layers",),
    ),
    Mutant(
        name="incomplete-folder-read-like-a-complete-one",
        claim="a killed conversion leaves nothing that looks complete",
        old="if path.name.endswith(PARTIAL_SUFFIX):",
        new="if path.name == PARTIAL_SUFFIX:",
        tests=("test_conversion.py::test_killed_conversion_leaves_nothing_that_looks_complete",),
    ),
    Mutant(
        name="living-ranks-taken-for-silent",
        claim="a rank that dies, stops, hangs or raises",
        old="silent = [rank for rank in now if now[rank] == before[rank]",
        new="silent = [rank for rank in now if now[rank] != before[rank]",
        tests=("test_supervision.py::test_a_silent_rank_of_another_host_is_named",),
    ),
    Mutant(
        name="loss-position-blamed-on-the-rollout-before",
        claim="a NaN planted in logits, blend, loss or gradient",
        old="sequence = bisect_right(self.cu_lengths, position) - 1",
        new="sequence = bisect_right(self.cu_lengths, position - 1) - 1",
        tests=("test_nonfinite.py::test_a_loss_position_is_described",),
    ),
    Mutant(
        name="signal-to-another-rank-not-heard",
        claim="a run stopped by signals and by a file",
        old="next((found for found in reasons if found is not None), None)",
        new="reasons[0]",
        tests=("test_stopping.py::test_stop_request_finishes_the_step_and_saves",),
    ),
    Mutant(
        name="second-ctrl-c-not-heard",
        claim="the first Ctrl-C saves, the second ends at once",
        old="if is_second and number in _ENDING:",
        new="if is_second and number == signal.SIGTERM:",
        tests=("test_interrupts.py::test_the_second_ends_at_once",),
    ),
    Mutant(
        name="one-ctrl-c-passed-on-twice-taken-for-two",
        claim="the first Ctrl-C saves, the second ends at once",
        old="now - self._interrupted_at > SAME_SIGNAL_S",
        new="now > self._interrupted_at",
        tests=("test_interrupts.py::test_a_signal_to_launcher_and_ranks_is_one_request",),
    ),
    Mutant(
        name="saved-run-ends-like-a-finished-one",
        claim="the first Ctrl-C saves, the second ends at once",
        old="sys.exit(stopped_status() if stopped.exists() else status)",
        new="sys.exit(status)",
        tests=("test_interrupts.py::test_the_first_saves",),
    ),
    Mutant(
        name="stop-file-of-a-saved-run-left-empty",
        claim="time limit, preemption, cancellation",
        old='self._file.write_text(message + "\\n")',
        new="self._file.touch()",
        tests=("test_stopping.py::test_stop_file_says_that_the_run_has_steps_left",),
    ),
    Mutant(
        name="metrics-past-the-checkpoint-kept",
        claim="30 trainings killed with SIGKILL",
        old='return json.loads(line)["step"] if line.endswith("\\n") else math.inf',
        new='return 0 if line.endswith("\\n") else math.inf',
        tests=("test_kills.py::test_killed_runs_end_like_undisturbed_ones",),
    ),
    Mutant(
        name="sums-compared-by-their-lengths",
        claim="damage to any file of a checkpoint is named",
        old="if sums[name] != expected[name]:",
        new="if len(sums[name]) != len(expected[name]):",
        tests=("test_checksums.py::test_flipped_bit_and_truncation_are_named",),
    ),
    Mutant(
        name="lock-shared-by-two-jobs",
        claim="a disk that is full at any file",
        old="if _lock(file, fcntl.LOCK_EX, say):",
        new="if _lock(file, fcntl.LOCK_SH, say):",
        tests=("test_faults.py::test_folder_of_another_job_is_refused_until_that_is_dead",),
    ),
    Mutant(
        name="index-not-checked-before-megatron-reads-it",
        claim="payloads planted in checkpoints do not run",
        old="read_index(checkpoint)\n    before = {",
        new="before = {",
        tests=("test_security.py::test_planted_checkpoint_is_refused_and_runs_nothing",),
    ),
    Mutant(
        name="whole-parameters-planned-as-if-cut",
        claim="the plan of a run has the parameters and bytes of real ranks",
        old="size if param.kind.cut_axis is None else size // tp_size",
        new="size // tp_size",
        tests=("test_plan.py::test_stages_and_ranks_hold_every_parameter_once",),
    ),
    Mutant(
        name="index-may-ask-for-any-attribute",
        claim="payloads planted in checkpoints do not run",
        old="isinstance(kind, EnumType) and name in kind.__members__:\n        return kind[name]",
        new="True:\n        return getattr(kind, name)",
        tests=("test_security.py::test_index_may_name_members_of_enumerations_alone",),
    ),
    Mutant(
        name="torch-unpickles-any-name",
        claim="payloads planted in checkpoints do not run",
        old='os.environ[_FORCE] = "1"',
        new='os.environ[_FORCE] = "0"',
        tests=("test_security.py::test_object_between_the_tensors_runs_nothing",),
    ),
    # Mathematics
    Mutant(
        name="entropy-of-a-shard-not-re-based",
        claim="every rank's partial sums refer to the maximum over all shards",
        old="(scale_RN * (weighted_RN + sum_RN * offset_RN)).sum(dim=0)",
        new="(scale_RN * weighted_RN).sum(dim=0)",
        tests=("test_views.py::test_entropy_and_probabilities",),
    ),
    Mutant(
        name="hidden-gradient-not-summed-over-shards",
        claim="what the columns of all ranks contribute is added",
        old="dist.all_reduce(self.grad_hidden_NH, group=self.tp_group)",
        new="dist.barrier(group=self.tp_group)",
        tests=("test_fused_loss.py::test_values_and_gradients",),
    ),
    Mutant(
        name="hidden-gradient-summed-over-replicas",
        claim="the mathematics on shards of 8 and 16 ranks",
        old="dist.all_reduce(self.grad_hidden_NH, group=self.tp_group)",
        new="dist.all_reduce(self.grad_hidden_NH)",
        tests=("test_fused_loss.py::test_values_and_gradients",),
    ),
    Mutant(
        name="loss-divided-by-the-tokens-of-a-microbatch",
        claim="the loss is a mean over all tokens of the global batch, never a mean of means",
        old="return loss_sum, num_tokens, metrics",
        new="return loss_sum / num_tokens, num_tokens.clamp(max=1), metrics",
        tests=("test_gradients.py::test_replicas_train_on_as_many_tokens_and_to_the_same_effect",),
    ),
    Mutant(
        name="labels-not-shifted",
        claim="the model at a position predicts the token behind it",
        old="labels += sequence[1:]",
        new="labels += sequence[:-1]",
        tests=("test_batch.py::test_labels_are_the_response_shifted_by_one",),
    ),
    Mutant(
        name="top-k-ties-to-the-highest-id",
        claim="ties of the top-k go to the lowest id",
        old="equal_MU.cumsum(dim=-1) <= num_wanted_M1",
        new="equal_MU.flip(-1).cumsum(dim=-1).flip(-1) <= num_wanted_M1",
        tests=("test_vocab_parallel.py::test_topk_breaks_ties_by_id",),
    ),
    Mutant(
        name="budget-annealed-one-step-early",
        claim="the budget of step k of K is ε₀ (1 - k / K), counted from 0",
        old="return kl_budget * (1 - step / warmup_steps)",
        new="return kl_budget * (1 - (step + 1) / warmup_steps)",
        tests=("test_schedule.py::test_schedule",),
    ),
    Mutant(
        name="learning-rate-rises-one-step-late",
        claim="the last step of the warmup has the full learning rate",
        old="math.cos(math.pi * (step + 1) / warmup_steps)",
        new="math.cos(math.pi * step / warmup_steps)",
        tests=("test_optimizer.py::test_learning_rate_rises_as_a_cosine_and_stays",),
    ),
    Mutant(
        name="likeliest-stop-id-stands-for-all",
        claim="stopping is one event: a model's stop probabilities are added",
        old="own_NK.logsumexp(dim=-1)",
        new="own_NK.amax(dim=-1)",
        tests=("test_stop_alignment.py::test_alignment_and_its_gradient",),
    ),
    Mutant(
        name="gradient-of-the-stop-event-spread-evenly",
        claim="the merged logit's gradient goes to the stop ids by their probabilities",
        old="return own_NK.softmax(dim=-1)",
        new="return torch.full_like(own_NK, 1 / own_NK.shape[-1])",
        tests=("test_stop_alignment.py::test_alignment_and_its_gradient",),
    ),
    Mutant(
        name="residual-not-reduced-by-the-student",
        claim="a declined proposal is replaced from the residual (μ - p)+",
        old="(behavior_logprobs_NU.exp() - student_logprobs_NU.exp()).clamp_min_(0)",
        new="behavior_logprobs_NU.exp()",
        tests=("test_coupling.py::test_draws_follow_the_behavior_policy",),
    ),
    Mutant(
        name="skd-mass-of-this-shard-only",
        claim="SKD is a distribution over the whole vocabulary",
        old="all_gather(replaced_N1, tp_group).sum(dim=0).log()",
        new="replaced_N1.log()",
        tests=("test_policies.py::test_guidance_is_that_of_a_dense_computation",),
    ),
    # Rollouts
    Mutant(
        name="repeated-prompt-gets-the-same-responses",
        claim="a prompt that comes twice in a step gets other responses",
        old="first = rollouts_per_prompt * num_seen[prompt.index]",
        new="first = 0",
        tests=("test_trainer.py::test_prompt_that_comes_twice_in_a_step_gets_other_responses",),
    ),
    Mutant(
        name="same-prompt-order-in-every-epoch",
        claim="the order of the prompts is a fresh permutation in each epoch",
        old="step=epoch,",
        new="step=0,",
        tests=("test_prompts.py::test_order_visits_each_prompt_once_per_epoch",),
    ),
    Mutant(
        name="page-freed-while-a-sequence-still-reads-it",
        claim="a page returns to the free ones when its last user releases it",
        old="if self._num_users[page] == 0:",
        new="if self._num_users[page] <= 1:",
        tests=("test_kv_cache.py::test_shared_pages_are_free_after_their_last_user",),
    ),
    Mutant(
        name="sequence-that-started-first-gives-way",
        claim="when memory runs short the sequence that started last gives way",
        old="max(group.sequences, key=lambda s: s.start)",
        new="min(group.sequences, key=lambda s: s.start)",
        tests=("test_scheduler.py::test_the_latest_gives_way_and_comes_back_first",),
    ),
    Mutant(
        name="new-token-sees-the-one-behind-it",
        claim="a token attends to itself and to those before it",
        old="(position_k <= last_Sq[..., None])",
        new="(position_k <= last_Sq[..., None] + 1)",
        tests=("test_paged_attention.py::test_equals_dense_causal_attention",),
    ),
    Mutant(
        name="drafts-timed-with-all-slots",
        claim="the costs of drafts are measured at the sequences that a step has",
        old="for count in sequences_to_time(num_sequences):",
        new="for count in sequences_to_time(engine.config.max_sequences):",
        tests=("test_engine.py::test_rounds_are_timed_at_the_sequences_and_lengths_of_a_step",),
    ),
    Mutant(
        name="acceptance-estimated-without-its-prior",
        claim="the choice of the draft length begins with the policy's bound on acceptance",
        old="return (PRIOR_POSITIONS * least_acceptance + num_accepted) / num_positions",
        new="return num_accepted / num_positions",
        tests=("test_drafting.py::test_acceptance_begins_with_its_bound_and_follows_the_counts",),
    ),
    Mutant(
        name="drafts-behind-a-declined-one-kept",
        claim="a round commits up to the first token that is not the student's proposal",
        old="if self.finished or drawn_id != drafted_id:",
        new="if self.finished or drafted_id is None:",
        tests=("test_sequences.py::test_frequencies_of_all_responses_are_exact",),
    ),
    # Runs
    Mutant(
        name="failed-write-printed-but-not-raised",
        claim="what cannot be written ends all ranks",
        old='raise describe(f"rank {rank}: {text}") from self.error',
        new='print(describe(f"rank {rank}: {text}"))',
        tests=("test_checkpoint.py::test_failed_save_leaves_the_last_checkpoint_and_names_it",),
    ),
    Mutant(
        name="steps-of-a-veto-run-not-fixed",
        claim="a run is resumed under its own configuration only",
        old='if config.loss.name == "veto" and',
        new='if config.loss.name == "jsd" and',
        tests=("test_config.py::test_steps_belong_to_a_run_whose_loss_decays_over_them",),
    ),
    Mutant(
        name="answers-no-part-of-the-datas-fingerprint",
        claim="a run is resumed on its own prompts only",
        old="record: list[Any] = [prompt.token_ids, prompt.answer, prompt.response_ids]",
        new="record: list[Any] = [prompt.token_ids, prompt.response_ids]",
        tests=("test_prompts.py::test_fingerprint_depends_on_everything_that_is_used",),
    ),
    Mutant(
        name="long-problems-no-part-of-the-datas-fingerprint",
        claim="a run is resumed on its own prompts only",
        old="for prompt in sorted((*prompts, *too_long),",
        new="for prompt in sorted(prompts,",
        tests=("test_prompts.py::test_fingerprint_knows_prompts_that_are_too_long",),
    ),
    Mutant(
        name="folder-renamed-before-its-files-are-on-the-disk",
        claim="a folder with its final name was complete and on the disk",
        old='for path in [*partial.rglob("*"), partial]:',
        new="for path in [partial]:",
        tests=(
            "test_atomic_folder.py::test_everything_is_on_the_disk_before_the_folder_gets_its_name",
        ),
    ),
    Mutant(
        name="vanished-folder-made-again",
        claim="a vanished folder is not made again",
        old="partial.mkdir()",
        new="partial.mkdir(parents=True)",
        tests=("test_atomic_folder.py::test_folder_that_vanished_is_not_made_again",),
    ),
    Mutant(
        name="fp8-magnitudes-reduced-over-replicas",
        claim="FP8 with delayed scaling gets Megatron's settings that cannot hang",
        old='"tp_only_amax_red": True,',
        new='"tp_only_amax_red": False,',
        tests=("test_fp8.py::test_megatron_gets_the_recipe_and_nothing_else_changes",),
    ),
    Mutant(
        name="sizes-checked-for-multiples-of-8",
        claim="FP8 needs sizes that are multiples of 16",
        old="MULTIPLE = 16",
        new="MULTIPLE = 8",
        tests=("test_fp8.py::test_sizes_that_no_product_takes_are_named",),
    ),
    Mutant(
        name="lost-reward-worker-not-counted",
        claim="a reward worker that hangs or dies is counted",
        old="self.num_timeouts = sum(grade.timed_out for grade in grades)",
        new="self.num_timeouts = 0",
        tests=("test_rewards.py::test_lost_worker_is_replaced_and_its_response_scores_zero",),
    ),
    Mutant(
        name="grading-limit-not-lifted-between-responses",
        claim="the limit of grading is for each response",
        old="signal.setitimer(signal.ITIMER_REAL, 0)",
        new="pass",
        tests=("test_rewards.py::test_limit_is_for_each_response",),
    ),
    Mutant(
        name="numerals-taken-for-units",
        claim="a unit behind a boxed number does not count, and whatever says more does",
        old="and word not in _NO_UNITS",
        new="and word",
        tests=("test_rewards.py::test_words_that_mean_more_than_a_unit_count",),
    ),
    Mutant(
        name="plain-letters-left-to-math-verify",
        claim="a unit behind a boxed number does not count, and whatever says more does",
        old="if len(answer) > _LONGEST_QUANTITY:",
        new="if answer.endswith('eggs'):",
        tests=("test_rewards.py::test_units_do_not_count",),
    ),
    Mutant(
        name="first-box-counts",
        claim="1,378 pairs of right answer and response are graded as a person would",
        old="answers = [boxes[-1][2]]",
        new="answers = [boxes[0][2]]",
        tests=("test_grading.py::test_final_answer_is_the_last_box_or_mark",),
    ),
    Mutant(
        name="unfinished-thinking-is-an-answer",
        claim="1,378 pairs of right answer and response are graded as a person would",
        old="if not tags[-1][1]:",
        new="if tags is None:",
        tests=("test_grading.py::test_final_answer_is_the_last_box_or_mark",),
    ),
    Mutant(
        name="small-numbers-are-rounded",
        claim="1,378 pairs of right answer and response are graded as a person would",
        old="if decimal.value == exact:",
        new="if round(decimal.value, 6) == round(exact, 6):",
        tests=("test_grading.py::test_numbers_of_all_sizes_are_compared_by_ratio",),
    ),
    Mutant(
        name="long-integers-taken-for-floats",
        claim="1,378 pairs of right answer and response are graded as a person would",
        old="is_double = decimal.is_float and decimal.digits >= _DOUBLE_DIGITS",
        new="is_double = decimal.digits >= _DOUBLE_DIGITS",
        tests=("test_grading.py::test_integers_have_all_their_digits_and_floats_fifteen",),
    ),
    Mutant(
        name="constants-compared-to-thirty-digits",
        claim="1,378 pairs of right answer and response are graded as a person would",
        old="precision = min(_PRECISION + max(_size(right), _size(given)), _MOST_PRECISION)",
        new="precision = _PRECISION",
        tests=("test_grading.py::test_constants_are_compared_to_the_last_digit_of_their_terms",),
    ),
    Mutant(
        name="tuples-have-no-order",
        claim="1,378 pairs of right answer and response are graded as a person would",
        old='if not brackets <= {"", "{}"}:',
        new='if brackets == {"[)"}:',
        tests=("test_grading.py::test_order_counts_in_brackets_and_not_in_sets",),
    ),
    Mutant(
        name="own-grader-may-return-anything",
        claim="a user's own grader has the same limits",
        old="if not is_number or not 0 <= result <= 1:",
        new="if not is_number:",
        tests=("test_rewards.py::test_own_grader_that_fails_ends_the_run",),
    ),
    Mutant(
        name="own-grader-checked-when-it-grades",
        claim="a user's own grader has the same limits",
        old='inspect.signature(function).bind("response", ["answer"])',
        new="inspect.signature(function)",
        tests=("test_rewards.py::test_own_grader_that_cannot_be_used_is_refused_at_the_start",),
    ),
    Mutant(
        name="numbers-written-with-exponent",
        claim="numbers as answers are exact and have no exponent",
        old='return f"{number:f}" if number.adjusted() < digits else f"{number:f}.0"',
        new="return str(number)",
        tests=("test_answers.py::test_json_numbers_are_read_as_they_are_written",),
    ),
    Mutant(
        name="long-decimals-taken-for-64-bits",
        claim="numbers as answers are exact and have no exponent",
        old="shortest = float(str(narrow(value)))",
        new="shortest = float(value)",
        tests=("test_answers.py::test_numbers_of_columns_have_the_fewest_digits",),
    ),
    Mutant(
        name="spelled-list-taken-for-one-answer",
        claim="numbers as answers are exact and have no exponent",
        old="not isinstance(value, str) or not _SPELLED_LIST.fullmatch(value)",
        new="True",
        tests=("test_answers.py::test_list_of_answers_may_be_spelled_in_json",),
    ),
    Mutant(
        name="form-feeds-pass",
        claim="LaTeX that lost its backslashes is refused or told",
        old="[\\b\\f]|[\\a\\v\\x1b]",
        new="[\\b]|[\\a\\v\\x1b]",
        tests=("test_answers.py::test_control_characters_of_latex_are_refused",),
    ),
    Mutant(
        name="configurations-hold-control-characters",
        claim="LaTeX that lost its backslashes is refused or told",
        old="if found := find_control(text):",
        new="if found := None:",
        tests=("test_config.py::test_broken_yaml_is_named_by_file_and_line",),
    ),
    Mutant(
        name="comment-cut-off-an-override",
        claim="the text of an override is read whole or refused",
        old='"a comment" if "#" in head else',
        new='"a comment" if "###" in head else',
        tests=("test_config.py::test_text_of_an_override_is_the_value_or_refused",),
    ),
    Mutant(
        name="some-answers-taken-for-none",
        claim="prompts without answers give no rewards, and answers in some rows are refused",
        old="if with_answer is not None and without is not None:",
        new="if without is None and with_answer is None:",
        tests=("test_prompts.py::test_answers_in_some_rows_are_refused",),
    ),
    Mutant(
        name="all-splits-of-a-folder-read-as-one",
        claim="a folder of prompts is read as `datasets.load_dataset` reads it",
        old="if any(splits.values()):",
        new="if not any(splits.values()):",
        tests=("test_files.py::test_folder_is_read_as_load_dataset_would",),
    ),
    Mutant(
        name="problems-of-the-train-split-by-default",
        claim="a folder of prompts is read as `datasets.load_dataset` reads it",
        old="chosen = wanted or only or default",
        new='chosen = wanted or only or default or "train"',
        tests=("test_files.py::test_problems_are_of_a_split_that_is_named",),
    ),
    Mutant(
        name="word-of-a-split-inside-another-word",
        claim="a folder of prompts is read as `datasets.load_dataset` reads it",
        old="(?:{words})(?:[-._ 0-9]|$)",
        new="(?:{words})",
        tests=("test_files.py::test_random_folders_are_those_of_the_datasets_library",),
    ),
    Mutant(
        name="same-rows-in-two-formats-read-twice",
        claim="a folder of prompts is read as `datasets.load_dataset` reads it",
        old="if len(by_suffix) > 1:",
        new="if len(by_suffix) > 9:",
        tests=("test_files.py::test_folder_is_read_as_load_dataset_would",),
    ),
    Mutant(
        name="part-of-a-folder-read-as-the-whole",
        claim="a folder of prompts is read as `datasets.load_dataset` reads it",
        old="if absent := sorted(set(whole) - numbers):",
        new="if absent := sorted(numbers - set(whole)):",
        tests=("test_files.py::test_folder_is_read_as_load_dataset_would",),
    ),
    Mutant(
        name="pattern-without-a-file-passed-over",
        claim="a folder of prompts is read as `datasets.load_dataset` reads it",
        old="if not found:\n            return _Split",
        new="if not files and not found:\n            return _Split",
        tests=("test_files.py::test_all_that_the_readme_names_is_there",),
    ),
    Mutant(
        name="last-of-two-equal-keys-wins",
        claim="text of any compression and format means the same",
        old="if len(values) < len(pairs):",
        new="if len(values) > len(pairs):",
        tests=("test_contents.py::test_broken_file_is_named",),
    ),
    Mutant(
        name="nan-is-an-answer",
        claim="text of any compression and format means the same",
        old='not math.isfinite(value):\n        raise ValueError(\n            f"{location} holds',
        new='math.isinf(value):\n        raise ValueError(\n            f"{location} holds',
        tests=("test_contents.py::test_what_is_no_number_is_no_answer",),
    ),
    Mutant(
        name="column-of-64-bits-read-as-one-of-32",
        claim="numbers as answers are exact and have no exponent",
        old="pyarrow.float32(): np.float32,",
        new="pyarrow.float32(): np.float32, pyarrow.float64(): np.float32,",
        tests=("test_answers.py::test_floats_are_those_of_their_column",),
    ),
    Mutant(
        name="class-label-left-a-number",
        claim="text of any compression and format means the same",
        old='if b"ClassLabel" not in content:',
        new='if b"ClassLabel" in content:',
        tests=("test_contents.py::test_class_labels_are_their_names",),
    ),
    Mutant(
        name="column-with-a-dot-in-its-name-passed-over",
        claim="text of any compression and format means the same",
        old="if name in row:\n        return row[name]",
        new='if name in row and "." not in name:\n        return row[name]',
        tests=("test_contents.py::test_nested_columns_are_named_with_dots",),
    ),
    Mutant(
        name="missing-value-of-csv-is-an-answer",
        claim="text of any compression and format means the same",
        old="_refuse_missing_words(row, columns, location)",
        new="",
        tests=("test_contents.py::test_words_for_missing_values_are_refused_in_csv",),
    ),
    Mutant(
        name="empty-cell-is-empty-text",
        claim="text of any compression and format means the same",
        old="(cell or None for cell in cells)",
        new="cells",
        tests=("test_contents.py::test_broken_file_is_named",),
    ),
    Mutant(
        name="solution-left-in-the-prompt",
        claim="a conversation that ends with its solution is refused",
        old='if (last := messages[-1]["role"]) != "user":',
        new='if (last := messages[-1]["role"]) == "system":',
        tests=("test_conversations.py::test_what_is_no_prompt_is_refused_by_its_row",),
    ),
    Mutant(
        name="messages-in-json-taken-for-text",
        claim="a conversation that ends with its solution is refused",
        old="if isinstance(value, str) and _spells_messages(value):",
        new="if isinstance(value, str) and _BEGINS_WITH_MESSAGE.match(value):",
        tests=("test_conversations.py::test_conversation_is_read_as_its_owner_means_it",),
    ),
    Mutant(
        name="instruction-that-the-prompt-repeats-taken-for-rendered",
        claim="a conversation that ends with its solution is refused",
        old="sum(other.count(content) for other in contents)",
        new="1",
        tests=("test_conversations.py::test_template_that_leaves_out_our_instruction_is_refused",),
    ),
    Mutant(
        name="thinking-of-an-earlier-answer-taken-for-the-answer",
        claim="a conversation that ends with its solution is refused",
        old="""{_MORE}"}""",
        new="""{message['content']}"}""",
        tests=("test_conversations.py::test_template_may_cut_the_thinking_of_earlier_answers",),
    ),
    Mutant(
        name="options-of-the-template-not-passed-on",
        claim="a conversation that ends with its solution is refused",
        old="**self._options,",
        new="",
        tests=("test_conversations.py::test_options_of_a_template",),
    ),
    Mutant(
        name="option-that-the-template-never-reads-accepted",
        claim="a conversation that ends with its solution is refused",
        old="if name not in known:",
        new="if name not in template:",
        tests=("test_conversations.py::test_options_are_the_variables_that_a_template_reads",),
    ),
    Mutant(
        name="start-report-names-no-split",
        claim="the start-up report is one screen",
        old="if others else",
        new="if not others else",
        tests=("test_files.py::test_summary_says_what_was_read",),
    ),
    Mutant(
        name="column-named-by-the-user-may-be-absent",
        claim="prompts without answers give no rewards, and answers in some rows are refused",
        old="if answer is not None and self.needs_answers:",
        new="if answer is None:",
        tests=("test_prompts.py::test_answers_are_in_all_rows_or_in_none",),
    ),
    Mutant(
        name="class-before-tokenizer-file",
        claim="token ids are those of `tokenizer.json`",
        old="kind = _FileTokenizer if has_file else AutoTokenizer",
        new="kind = AutoTokenizer",
        tests=("test_tokenizer.py::test_ids_are_those_of_the_file_whatever_the_class",),
    ),
    Mutant(
        name="evaluation-without-a-look-at-transformers-tokenizer",
        claim="token ids are those of `tokenizer.json`",
        old="for warning in sources.check_tokenizers(problem_sets.values()):",
        new="for warning in ():",
        tests=("test_evaluate.py::test_command_warns_of_ids_that_transformers_reads_differently",),
    ),
    Mutant(
        name="special-tags-hidden-from-grading",
        claim="tags such as `<think>` count in grading",
        old="if token.special and (token.content in named or not _TAG.fullmatch(token.content))",
        new="if token.special",
        tests=("test_sources.py",),
    ),
    Mutant(
        name="supervised-responses-end-with-the-first-stop-id",
        claim="supervised training ends each response with one stop token",
        old='token_id, reason = found[0], "which',
        new='token_id, reason = stop_ids[0], "which',
        tests=("test_response_end.py",),
    ),
    Mutant(
        name="weights-known-by-name",
        claim="a run's inputs are known by content",
        old="digest.update(tensor.flatten().view(torch.uint8).numpy())",
        new="digest.update(name.encode())",
        tests=("test_checkpoint.py::test_run_folder_of_another_run_is_refused",),
    ),
    Mutant(
        name="sequences-of-one-length-see-one-another",
        claim="logits",
        old="x.unflatten(0, (-1, length)).transpose(1, 2) for x in part",
        new="x.unflatten(0, (1, -1)).transpose(1, 2) for x in part",
        tests=("test_models.py::test_logits_agree_with_transformers",),
    ),
    Mutant(
        name="weights-vouched-for-by-name-size-and-modification-time",
        claim="a run's inputs are known by content",
        old="[path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]",
        new="[path.rpartition('/')[2], stat.st_size, stat.st_mtime_ns]",
        tests=("test_digest.py", "test_checkpoint.py::test_run_folder_of_another_run_is_refused"),
    ),
    Mutant(
        name="date-of-a-template-from-the-clock-at-each-start",
        claim="the date that a chat template prints",
        old="_read_date(file) or datetime.now().date()",
        new="datetime.now().date()",
        tests=("test_template_date.py",),
    ),
    Mutant(
        name="long-problems-vanish",
        claim="problems that are too long count as wrong",
        old="num_correct = [0] * (len(problems.prompts) + len(problems.too_long))",
        new="num_correct = [0] * len(problems.prompts)",
        tests=("test_evaluate.py::test_command_needs_a_model_and_problems_alone",),
    ),
    Mutant(
        name="training-asked-of-an-evaluation",
        claim="an evaluation needs a model and problems alone",
        old="if isinstance(config, Config) and config.is_distilling:",
        new="if config.training.task == 'distill':",
        tests=("test_config.py::test_job_that_does_not_train_needs_less",),
    ),
    Mutant(
        name="overrides-of-an-evaluation-lost",
        claim="an evaluation needs a model and problems alone",
        old="for word in words if is_override(word)] + options.overrides",
        new="for word in words if is_override(word)]",
        tests=("test_evaluate.py::test_command_evaluates_as_training_does",),
    ),
    Mutant(
        name="samples-of-a-problem-all-called-the-first",
        claim="an evaluation needs a model and problems alone",
        old='"sample": self.sample,',
        new='"sample": 0,',
        tests=("test_evaluate.py::test_command_needs_a_model_and_problems_alone",),
    ),
    Mutant(
        name="system-prompt-put-before-the-messages-own",
        claim="messages bring their own system prompt",
        old='if self._system_prompt is not None and messages[0]["role"] != "system":',
        new="if self._system_prompt is not None:",
        tests=("test_prompts.py::test_messages_bring_their_own_system_prompt",),
    ),
    Mutant(
        name="assistants-turn-not-opened",
        claim="the chat template ends with the opening of the assistant's turn",
        old="add_generation_prompt=True,",
        new="add_generation_prompt=False,",
        tests=("test_prompts.py::test_chat_template_is_rendered_around_the_prompt",),
    ),
    # Models and tools
    Mutant(
        name="tokens-counted-in-place-of-the-highest-id",
        claim="distributions are over the ids up to the tokenizer's highest",
        old="return max(tokenizer.get_vocab().values()) + 1",
        new="return len(tokenizer.get_vocab())",
        tests=("test_tokenizer.py::test_tokenizer_size_is_the_highest_id_plus_one",),
    ),
    Mutant(
        name="type-of-the-first-tensor-for-all",
        claim="a conversion keeps the type of each tensor",
        old="reduce(torch.promote_types, found + known)",
        new="found[0]",
        tests=("test_conversion.py::test_types_are_kept_tensor_by_tensor",),
    ),
    Mutant(
        name="pass-at-k-of-the-right-answers",
        claim="pass@k is the unbiased estimate",
        old="math.comb(num_samples - num_correct, k)",
        new="math.comb(num_correct, k)",
        tests=("test_evaluate.py::test_pass_at_k_is_the_share_of_subsets_with_a_right_answer",),
    ),
    Mutant(
        name="greedy-tokens-compared-one-place-late",
        claim="trb-verify-conversion counts the greedy tokens that agree",
        old="chosen_T = ours_TV[before].argmax(-1)",
        new="chosen_T = ours_TV[-text.num_new :].argmax(-1)",
        tests=("test_verify_conversion.py::test_comparison_of_known_logits",),
    ),
    Mutant(
        name="half-precision-excuses-everything",
        claim="trb-verify-conversion counts the greedy tokens that agree",
        old="and self.errors.rms <= self.limits.rms",
        new="",
        tests=("test_verify_conversion.py::test_what_rounding_explains_holds",),
    ),
    Mutant(
        name="tensors-without-a-place-left-out",
        claim="a folder's weights give the logits of transformers",
        old="_refuse_unknown(config, unknown)\n    for name",
        new="for name",
        tests=("test_weight_rule.py",),
    ),
    Mutant(
        name="weights-with-nan-are-read",
        claim="a folder's weights give the logits of transformers",
        old="if not torch.stack(param.aminmax()).isfinite().all():",
        new="if False:",
        tests=("test_weight_rule.py",),
    ),
    Mutant(
        name="index-before-a-single-file",
        claim="a folder's weights give the logits of transformers",
        old="if (path / SINGLE_FILE).is_file():\n            self._add",
        new="if not (path / INDEX_FILE).is_file():\n            self._add",
        tests=("test_weight_rule.py",),
    ),
    Mutant(
        name="window-of-mistral-by-a-key-of-qwen",
        claim="500 changed configurations are refused by name",
        old="is_short and (own_types",
        new='getattr(config, "use_sliding_window", False) and is_short and (own_types',
        tests=("test_config_rule.py", "test_families.py"),
    ),
    Mutant(
        name="rope-parameters-from-one-place-alone",
        claim="500 changed configurations are refused by name",
        old="config.standardize_rope_params()",
        new="config.rope_parameters",
        tests=("test_config_rule.py",),
    ),
    Mutant(
        name="a-model-that-sees-later-tokens-read-as-causal",
        claim="500 changed configurations are refused by name",
        old='"is_causal": _CAUSAL,',
        new="",
        tests=(
            "test_config_rule.py"
            "::test_no_key_that_transformers_looks_for_changes_a_model_in_silence",
        ),
    ),
    Mutant(
        name="pointer-read-as-weights",
        claim="a Git LFS pointer is called one",
        old="if opened.read(len(GIT_LFS_HEAD)) == GIT_LFS_HEAD:",
        new="if not opened:",
        tests=("test_formats.py::test_a_pointer_of_git_lfs_says_so",),
    ),
    Mutant(
        name="verification-without-transformers-own-list",
        claim="trb-verify-conversion refuses what transformers leaves out",
        old='("leaves out", left_out)',
        new='("leaves out", ())',
        tests=("test_verify_conversion.py::test_transformers_own_list_of_keys_is_looked_at",),
    ),
)


def find_source(mutant: Mutant, root: Path) -> Path:
    """The file below `root` that the mutant changes.

    Raises:
        ValueError: its text does not occur exactly once.
    """
    files = [file for folder in SOURCES for file in sorted((root / folder).rglob("*.py"))]
    counts = {file: file.read_text(encoding="utf-8").count(mutant.old) for file in files}
    found = [file for file, count in counts.items() for _ in range(count)]
    if len(found) != 1:
        places = ", ".join(file.relative_to(root).as_posix() for file in found) or "nowhere"
        raise ValueError(f"{mutant.name}: {mutant.old!r} must occur once, but occurs in: {places}")
    return found[0]


def find_test(test: str, root: Path) -> str:
    """The pytest id of one of `Mutant.tests`.

    Raises:
        ValueError: not exactly one file has that name, or it lacks the function.
    """
    name, _, function = test.partition("::")
    found = sorted((root / "tests").rglob(name))
    if len(found) != 1:
        raise ValueError(f"{test}: {len(found)} files below tests/ are called {name}")
    if function and not re.search(
        rf"^def {re.escape(function)}\(", found[0].read_text(encoding="utf-8"), re.MULTILINE
    ):
        raise ValueError(f"{test}: {name} has no function {function}")
    path = found[0].relative_to(root).as_posix()
    return f"{path}::{function}" if function else path


@contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of the files of the working tree that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder) / "tree"
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():  # not deleted
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        yield root


def run_tests(root: Path, tests: Sequence[str], timeout_s: float) -> tuple[int | None, str]:
    """Exit status of pytest in a copied tree, None if it ran out of time, and its output."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(root),  # before an editable installation, in child processes, too
        "PYTHONDONTWRITEBYTECODE": "1",  # a mutant may have the size and time of the original
        "COLUMNS": "300",
    }
    options = ["-x", "-q", "--color=no", "-p", "no:cacheprovider", "-m", MARKERS]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, f"--basetemp={root.parent / 'pytest'}", *tests],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, _end(process)
    except KeyboardInterrupt:
        _end(process)
        raise


def _end(process: subprocess.Popen[str]) -> str:
    """Interrupt pytest, whose fixtures then end the ranks that they started; its output."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=30)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def judge(status: int | None, output: str) -> tuple[str, str]:
    """The verdict on a mutant, and the test that killed it or the reason why none could.

    Only a test that ran and failed kills: an error of collection, a file without tests or a run
    out of time say nothing about the mutant.
    """
    failed = re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - |$)", output, re.MULTILINE)
    if status == 1 and failed is not None:
        return KILLED, failed[1]
    if status == 0:
        return SURVIVED, "no test failed"
    lines = output.strip().splitlines()
    reason = "time-out" if status is None else f"pytest ends with status {status}"
    return COULD_NOT_RUN, f"{reason}: {lines[-1] if lines else 'no output'}"


def try_mutant(mutant: Mutant, root: Path, timeout_s: float) -> tuple[str, str]:
    """`judge` a mutant in a copied tree, which is afterwards as it was."""
    try:
        file = find_source(mutant, root)
        tests = [find_test(test, root) for test in mutant.tests]
    except ValueError as error:
        return COULD_NOT_RUN, str(error)
    original = file.read_text(encoding="utf-8")
    file.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return judge(*run_tests(root, tests, timeout_s))
    finally:
        file.write_text(original, encoding="utf-8")


def passes_clean(mutants: Iterable[Mutant], root: Path) -> bool:
    """Whether the mutants' tests pass without any mutant; prints what fails."""
    tests = dict.fromkeys(find_test(test, root) for m in mutants for test in m.tests)
    started = time.monotonic()
    status, output = run_tests(root, list(tests), TIMEOUT_S * len(tests))
    if status != 0:
        print(output)
    verdict = "pass" if status == 0 else "DO NOT PASS"
    print(f"without a mutant the tests {verdict} ({time.monotonic() - started:.0f} s)", flush=True)
    return status == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the mutants that are named, or all; 0 if each was killed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to try (default: all)")
    parser.add_argument(
        "--check-clean", action="store_true", help="first see that the tests pass without a mutant"
    )
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds for each mutant")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - {mutant.name for mutant in MUTANTS})
    if unknown:
        parser.error(f"no such mutant: {', '.join(unknown)}")
    chosen = [m for m in MUTANTS if not options.names or m.name in options.names]
    verdicts: Counter[str] = Counter()
    with copied_tree() as root:
        if options.check_clean and not passes_clean(chosen, root):
            return 1
        for mutant in chosen:
            started = time.monotonic()
            verdict, detail = try_mutant(mutant, root, options.timeout)
            verdicts[verdict] += 1
            seconds = time.monotonic() - started
            print(f"{mutant.name}: {verdict} ({detail}), {seconds:.0f} s", flush=True)
    counts = (f"{verdicts[verdict]} {verdict}" for verdict in (KILLED, SURVIVED, COULD_NOT_RUN))
    print(f"{len(chosen)} mutants: {', '.join(counts)}")
    return 0 if verdicts[KILLED] == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
