"""The keys of torchtitan's TOML files that ours do not have, and what to do instead.

torchtitan had TOML files until the beginning of 2026. The keys are those of its `config_manager.py` and
`job_config.py` in all that time. A key that is the same here is not listed. A section that is not here at all
is one entry.
"""

_RENAMED = {
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "model.hf_assets_path": "data.tokenizer",
    "model.tokenizer_path": "data.tokenizer",
    "profiling.run_profiler": "profiling.enable_profiling",
    "training.batch_size": "training.local_batch_size",
    "training.checkpoint_folder": "checkpoint.folder",
    "training.checkpoint_interval": "checkpoint.interval",
    "training.compile": "compile.enable",
    "training.context_parallel_degree": "parallelism.context_parallel_degree",
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.deterministic": "debug.deterministic",
    "training.seed": "debug.seed",
    "training.sequence_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "validation.enabled": "validation.enable",
}
"""The name here of each key whose values are the same."""

_TEXT = 'set data.dataset = "python_stdlib", or name a text in data.path, with data.dataset "text" or "jsonl"'
_REPLACED = {
    "job.config_file": "write --config FILE.toml on the command line instead",
    "job.custom_config_module": "name modules that add options in job.plugins",
    "optimizer.fused": 'set optimizer.implementation = "fused"',
    "parallelism.context_parallel_rotate_method": 'set parallelism.context_parallel_method = "allgather"',
    "training.dataset": _TEXT,
    "training.dataset_path": _TEXT,
    "training.enable_loss_parallel": "write parallelism.disable_loss_parallel instead, the opposite of it",
}
"""The remedy for each key of torchtitan whose counterpart here takes other values."""

_EXPERTS = "there are no experts in these models"
_FLOAT8 = "there is no training in float8 or MXFP8"
_HELD_OUT = "validation reads the share of the text that data.validation_fraction holds out"
_LOADER = "a thread of each rank reads samples ahead"
_MEMORY = "memory snapshots are not taken, and metrics.jsonl has the peak of the memory"
_PIPELINE = "there is no pipeline parallelism"
_RANKS = "rank 0 writes the numbers, which are those of all ranks"
_RECOMPUTE = "what is recomputed follows from activation_checkpoint.mode alone"
_RECORDER = "TORCH_FR_BUFFER_SIZE and other variables of torch set its flight recorder"
_SHOWN = "--dry-run prints the configuration, and config.toml in the run's folder has it"
_WEIGHTS_ONLY = "checkpoint.initial_load_path always gives the weights alone"

_LACKING = {
    "activation_checkpoint.debug": _RECOMPUTE,
    "activation_checkpoint.determinism_check": _RECOMPUTE,
    "activation_checkpoint.early_stop": _RECOMPUTE,
    "activation_checkpoint.memory_budget": _RECOMPUTE,
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": _RECOMPUTE,
    "activation_checkpoint.preserve_rng_state": _RECOMPUTE,
    "activation_checkpoint.visualize_memory_budget_pareto": _RECOMPUTE,
    "checkpoint.create_seed_checkpoint": "debug.seed gives the same weights on any number of ranks",
    "checkpoint.enable_first_step_checkpoint": "each start tries whether steps can be saved",
    "checkpoint.enable_ft_dataloader_checkpoints": "each step has the position in the data",
    "checkpoint.exclude_from_loading": "a run resumes with all of its state",
    "checkpoint.initial_load_in_hf_quantized": _FLOAT8,
    "checkpoint.initial_load_model_only": _WEIGHTS_ONLY,
    "checkpoint.initial_load_model_weights_only": _WEIGHTS_ONLY,
    "checkpoint.interval_type": "checkpoint.interval counts steps",
    "checkpoint.load_only": "checkpoint.initial_load_path loads weights without saving any",
    "comm.mode": "--dry-run --world-size checks a configuration without ranks",
    "comm.save_traces_file_prefix": _RECORDER,
    "comm.save_traces_folder": _RECORDER,
    "comm.trace_buf_size": _RECORDER,
    "compile.components": "the blocks and the attention are compiled, and the loss has kernels of its own",
    "debug.deterministic_warn_only": "debug.deterministic refuses what is not deterministic",
    "debug.moe_force_load_balance": _EXPERTS,
    "job.print_args": _SHOWN,
    "job.print_config": _SHOWN,
    "job.save_config_file": _SHOWN,
    "job.use_for_integration_test": "it changes nothing here",
    "metrics.disable_color_printing": "it changes nothing here",
    "metrics.enable_color_printing": "it changes nothing here",
    "metrics.enable_wandb": "metrics.jsonl and TensorBoard have the numbers, and a plugin can add a hook",
    "metrics.rank_0_only": _RANKS,
    "metrics.save_for_all_ranks": _RANKS,
    "model.converters": _FLOAT8,
    "model.norm_type": "the family of the model has its norm",
    "model.print_after_conversion": _FLOAT8,
    "optimizer.early_step_in_backward": "the optimizer steps once all gradients are there",
    "parallelism.enable_async_tensor_parallel": "tensor parallel has no asynchronous mode",
    "parallelism.enable_compiled_autograd": "compile.enable compiles the backward pass too",
    "parallelism.expert_parallel_comm_backend": _EXPERTS,
    "parallelism.expert_parallel_degree": _EXPERTS,
    "parallelism.expert_tensor_parallel_degree": _EXPERTS,
    "parallelism.module_fqns_per_model_part": _PIPELINE,
    "parallelism.pipeline_parallel_degree": _PIPELINE,
    "parallelism.pipeline_parallel_expert_parallel_overlap": _PIPELINE,
    "parallelism.pipeline_parallel_first_stage_less_layers": _PIPELINE,
    "parallelism.pipeline_parallel_last_stage_less_layers": _PIPELINE,
    "parallelism.pipeline_parallel_layers_per_stage": _PIPELINE,
    "parallelism.pipeline_parallel_microbatch_size": _PIPELINE,
    "parallelism.pipeline_parallel_microbatches": _PIPELINE,
    "parallelism.pipeline_parallel_schedule": _PIPELINE,
    "parallelism.pipeline_parallel_schedule_csv": _PIPELINE,
    "parallelism.pipeline_parallel_split_points": _PIPELINE,
    "profiling.enable_memory_snapshot": _MEMORY,
    "profiling.profiler_active": "profiling.profile_freq alone says which steps are recorded",
    "profiling.profiler_warmup": "profiling.profile_freq alone says which steps are recorded",
    "profiling.save_memory_snapshot_folder": _MEMORY,
    "training.checkpoint_interval_type": "checkpoint.interval counts steps",
    "training.data_parallel_type": "parallelism.data_parallel_shard_degree has FSDP at 2 or more",
    "training.dataloader": _LOADER,
    "training.dtype": "weights are float32, and training.mixed_precision_param is for the computation",
    "training.enable_float8_linear": _FLOAT8,
    "training.enable_fsdp_float8_all_gather": _FLOAT8,
    "training.fp8_linear": _FLOAT8,
    "training.gc_debug": "the process itself sets when Python collects garbage",
    "training.gc_freq": "the process itself sets when Python collects garbage",
    "training.mixed_precision_reduce": "gradients are summed in float32",
    "training.pipeline_parallel_degree": _PIPELINE,
    "training.precompute_float8_dynamic_scale_for_fsdp": _FLOAT8,
    "validation.dataloader": _LOADER,
    "validation.dataset": _HELD_OUT,
    "validation.dataset_path": _HELD_OUT,
    "validation.local_batch_size": "validation uses training.local_batch_size",
    "validation.seq_len": "validation uses training.seq_len",
    # Whole sections.
    "experimental": "parallel degrees are in [parallelism], and modules to import in job.plugins",
    "fault_tolerance": "a run resumes from its newest checkpoint (checkpoint.enable)",
    "float8": _FLOAT8,
    "liger_kernel": "the loss never holds all logits at once",
    "memory_estimation": "--dry-run prints the memory of weights, gradients and optimizer",
    "mx": _FLOAT8,
    "quantize": _FLOAT8,
}
"""The reason for each key and section that can only be left out."""

REMEDIES = {
    **{old: f"write {new} instead" for old, new in _RENAMED.items()},
    **_REPLACED,
    **{old: f"leave it out, as {reason}" for old, reason in _LACKING.items()},
}
"""The remedy for each key or section of torchtitan that does not exist here."""
