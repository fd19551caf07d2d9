"""What the adapter of vLLM relies on."""

from .expectations import Expected

_LOADER = "vllm.model_executor.model_loader.default_loader:DefaultModelLoader"
_RELOAD = "vllm.model_executor.model_loader.reload.inplace:reload_weights"
_CORE = "vllm.v1.engine.core:EngineCore"
_WORKER = "vllm.v1.worker.worker_base:WorkerWrapperBase or vllm.worker.worker_base:WorkerWrapperBase"
_GROUPS = "vllm.distributed.parallel_state"
_ARGUMENTS = "vllm.engine.arg_utils:EngineArgs"
_DAEMON = "vllm.model_executor.model_loader.weight_cache.daemon"
_SHARDED = "vllm.model_executor.model_loader.sharded_state_loader:ShardedStateLoader"

_FILES = "the loader class replaces the iterator over safetensors files"
_OVERRIDE = "the loader class overrides it and calls it"
_RANK = "ranks are built in one process"
_CACHE = "the compile cache is restored before warm-up and saved after it"
_HEADERS = "headers of the weights answer before the model is built"
_MASK = "the loader passes for a format of vLLM's"

_PHASES = "a phase of a start is noted"
_NOTED = (
    "vllm.v1.engine.core_client:MPClient",
    "vllm.v1.engine.core_client:MPClient.__init__",
    "vllm.v1.engine.async_llm:AsyncLLM",
    "vllm.v1.engine.async_llm:AsyncLLM.__init__",
    "vllm.entrypoints.llm:LLM",
    "vllm.entrypoints.llm:LLM.__init__",
    "vllm.v1.engine.core:EngineCoreProc.run_busy_loop",
    "vllm.v1.worker.gpu_worker:Worker.load_model",
    "vllm.v1.worker.gpu_worker:Worker.initialize_from_config",
    "vllm.model_executor.model_loader:base_loader",
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model",
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_weights",
    "vllm.model_executor.model_loader.base_loader:initialize_model",
    "vllm.model_executor.model_loader.base_loader:process_weights_after_loading",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.capture_model",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.capture_model",
    "vllm.compilation:decorators",
    "vllm.compilation.wrapper:TorchCompileWithNoGuardsWrapper",
    "vllm.compilation.wrapper:TorchCompileWithNoGuardsWrapper.aot_compile",
)

PRESENT = (
    *(Expected(path, _PHASES, required=False) for path in _NOTED),
    Expected("vllm.model_executor.model_loader:register_model_loader", "the format", takes=("load_format",)),
    Expected("vllm.model_executor.model_loader:get_model_loader", "the format", takes=("load_config",)),
    Expected(
        "vllm.model_executor.model_loader:LoadFormats", _MASK, says=("hf", "mistral", "safetensors"), required=False
    ),
    Expected(
        "vllm.model_executor.model_loader.default_loader:safetensors_weights_iterator",
        _FILES,
        takes=("hf_weights_files", "use_tqdm_on_load"),
        keywords=("safetensors_load_strategy", "local_expert_ids"),
    ),
    Expected(f"{_LOADER}.__init__", _OVERRIDE, takes=("load_config",)),
    Expected(f"{_LOADER}._get_weights_iterator", _FILES, takes=("source",), calls=("safetensors_weights_iterator",)),
    Expected(
        f"{_LOADER}.get_all_weights", _OVERRIDE, takes=("model_config", "model"), calls=("_get_weights_iterator",)
    ),
    Expected(f"{_LOADER}.load_weights", _OVERRIDE, takes=("model", "model_config"), calls=("get_all_weights",)),
    Expected(f"{_LOADER}.download_model", _OVERRIDE, takes=("model_config",)),
    Expected(f"{_LOADER}.create_model", _OVERRIDE, takes=("vllm_config", "model_config"), required=False),
    Expected(f"{_LOADER}.load_model", _OVERRIDE, calls=("load_weights",)),
    Expected(f"{_LOADER}._prepare_weights", _MASK, says=("hf", "mistral", "safetensors")),
    Expected(f"{_LOADER}.counter_before_loading_weights", "the time is counted from the first load"),
    Expected(f"{_LOADER}.local_expert_ids", "experts of other ranks are passed over", required=False),
    Expected(f"{_LOADER}.Source.model_or_path", _FILES),
    Expected(f"{_LOADER}.Source.prefix", _FILES),
    Expected(f"{_LOADER}.Source.subfolder", _FILES, required=False),
    Expected(f"{_LOADER}.Source.allow_patterns_overrides", _FILES, required=False),
    Expected("vllm.config:LoadConfig.load_format", _MASK),
    Expected("vllm.config:LoadConfig.model_loader_extra_config", "options of this package"),
    Expected("vllm.config:LoadConfig.use_tqdm_on_load", "progress is shown where vLLM shows it"),
    Expected("vllm.config:LoadConfig.safetensors_load_strategy", "torchao is left to vLLM", required=False),
    Expected(_RELOAD, "a reload reads the new path", calls=("get_model_loader", "get_all_weights"), required=False),
    Expected(
        "vllm.model_executor.models.utils:PPMissingLayer", "layers of other stages are not read ahead", required=False
    ),
    Expected(
        "vllm.model_executor.models.utils:StageMissingLayer",
        "layers of other stages are not read ahead",
        required=False,
    ),
    Expected(
        "vllm.model_executor.model_loader.ep_weight_filter:should_skip_weight",
        "experts of other ranks are passed over",
        takes=("weight_name", "local_expert_ids"),
        required=False,
    ),
    Expected(f"{_ARGUMENTS}.create_engine_config", _HEADERS),
    Expected(
        f"{_ARGUMENTS}.__post_init__", "the plugin is loaded before a configuration", calls=("load_general_plugins",)
    ),
    Expected(f"{_ARGUMENTS}.load_format", _HEADERS),
    Expected(f"{_ARGUMENTS}.model", _HEADERS),
    Expected(f"{_ARGUMENTS}.tokenizer", "models in a bucket"),
    Expected(f"{_ARGUMENTS}.served_model_name", "models in a bucket"),
    Expected(f"{_ARGUMENTS}.model_loader_extra_config", _HEADERS),
    Expected(
        "vllm.transformers_utils.repo_utils:get_safetensors_params_metadata or "
        "vllm.transformers_utils.config:get_safetensors_params_metadata",
        _HEADERS,
        takes=("model",),
        keywords=("revision",),
        required=False,
    ),
    Expected("vllm.v1.executor.abstract:Executor.__init__", _CACHE, takes=("vllm_config",)),
    Expected(
        "vllm.v1.executor.ray_executor_v2:RayExecutorV2.__init__",
        _CACHE,
        takes=("vllm_config",),
        calls=("__init__",),
        required=False,
    ),
    Expected(
        "vllm.v1.executor.multiproc_executor:WorkerProc.__init__",
        _CACHE,
        calls=("WorkerWrapperBase", "init_worker", "init_device"),
    ),
    Expected(f"{_CORE}.__init__", _CACHE, calls=("load_general_plugins", "_initialize_kv_caches", "executor_class")),
    Expected(f"{_CORE}.model_executor", _CACHE),
    Expected(f"{_CORE}.vllm_config", _CACHE),
    Expected(f"{_CORE}._initialize_kv_caches", _CACHE, calls=("determine_available_memory", "initialize_from_config")),
    Expected(_WORKER.replace("Base", "Base.init_worker"), _CACHE, calls=("load_general_plugins",)),
    Expected(_WORKER.replace("Base", "Base.init_device"), _CACHE),
    Expected(_WORKER.replace("Base", "Base.worker"), _CACHE),
    Expected(_WORKER.replace("Base", "Base.vllm_config"), _CACHE),
    Expected("vllm.v1.worker.gpu_worker:Worker.determine_available_memory", _CACHE),
    Expected("vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model", _CACHE),
    Expected("vllm.v1.worker.cpu_worker:CPUWorker.determine_available_memory", _CACHE),
    Expected("vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model", _CACHE),
    Expected("vllm.transformers_utils.repo_utils:file_or_path_exists", _MASK, required=False),
    Expected("vllm.transformers_utils.repo_utils:is_mistral_model_repo", _MASK, required=False),
    Expected("vllm.utils.torch_utils:set_default_torch_dtype", _RANK, required=False),
    Expected(
        "vllm.distributed.elastic_ep.elastic_state:ElasticEPScalingState",
        "a rank that joins an engine saves after its own warm-up",
        says=("elastic_ep_execute", ("warmup_new_worker", "warmup_local_kernels")),
        required=False,
    ),
    Expected(
        "vllm.distributed.elastic_ep.elastic_state:ElasticEPScalingState._collective_rpc",
        "a rank that joins an engine saves after its own warm-up",
        required=False,
    ),
    Expected(
        "vllm.distributed.elastic_ep.elastic_state:ElasticEPScalingState.engine_core",
        "a rank that joins an engine saves after its own warm-up",
        required=False,
    ),
    Expected("vllm.model_executor.models.registry:_LazyRegisteredModel.inspect_model_cls", _CACHE),
    Expected(
        "vllm.model_executor.models.registry:_LazyRegisteredModel._get_cache_filename", _CACHE, takes=(), required=False
    ),
    Expected("vllm.model_executor.models.registry:_LazyRegisteredModel._get_cache_dir", _CACHE, required=False),
    Expected("vllm.model_executor.models.registry:_run_in_subprocess", _RANK),
    Expected("vllm.envs:compile_factors", "a miss is explained by vLLM's key", required=False),
    Expected("vllm.config.parallel:ParallelConfig.tensor_parallel_size", _CACHE),
    Expected("vllm.config.parallel:ParallelConfig.pipeline_parallel_size", _CACHE),
    Expected("vllm.config.parallel:ParallelConfig.data_parallel_size", _CACHE),
    Expected("vllm.config.parallel:ParallelConfig.data_parallel_rank", _CACHE),
    Expected("vllm.config.parallel:ParallelConfig.data_parallel_size_local", _CACHE, required=False),
    Expected("vllm.config.parallel:ParallelConfig.data_parallel_index", _CACHE, required=False),
    Expected("vllm.config.parallel:ParallelConfig.node_rank_within_dp", _CACHE, required=False),
    Expected("vllm.config.parallel:ParallelConfig.local_world_size", _CACHE, required=False),
    Expected("vllm.config.compilation:CompilationConfig.cache_dir", _CACHE),
    Expected("vllm.config.compilation:CompilationConfig.local_cache_dir", _CACHE, required=False),
    Expected("vllm.compilation.decorators:_try_load_aot_compiled_fn", "the fix-up vllm-aot-finalize", required=False),
    Expected(f"{_GROUPS}:init_distributed_environment", _RANK, takes=("world_size", "rank")),
    Expected(
        f"{_GROUPS}:initialize_model_parallel",
        _RANK,
        takes=("tensor_model_parallel_size", "pipeline_model_parallel_size"),
        keywords=("backend",),
    ),
    Expected(
        f"{_GROUPS}:init_model_parallel_group",
        _RANK,
        takes=("group_ranks", "local_rank", "backend"),
        keywords=("group_name",),
    ),
    Expected(
        f"{_GROUPS}:GroupCoordinator.__init__",
        _RANK,
        keywords=("group_ranks", "local_rank", "torch_distributed_backend", "use_device_communicator", "group_name"),
    ),
    Expected(f"{_GROUPS}:_node_count", _RANK),
    Expected(f"{_GROUPS}:destroy_model_parallel", _RANK),
    Expected(f"{_GROUPS}:destroy_distributed_environment", _RANK),
    Expected(
        "vllm.model_executor.model_loader.utils:initialize_model", _RANK, keywords=("vllm_config", "model_config")
    ),
    Expected(f"{_SHARDED}._filter_subtensors", "sharded_state checkpoints", takes=("tensors",)),
    Expected(
        f"{_SHARDED}.save_model",
        "engine-loader reshard",
        takes=("model", "path"),
        keywords=("pattern", "max_size"),
    ),
    Expected(
        "vllm.model_executor.model_loader.weight_utils:get_quant_config",
        "engine-loader reshard of GPTQ and AWQ",
        takes=("model_config", "load_config"),
    ),
    Expected(
        "vllm.model_executor.model_loader.weight_tying:_get_untied_lm_head",
        "sharded_state checkpoints with a tied head",
        takes=("model",),
        required=False,
    ),
    Expected(
        f"{_DAEMON}:_run_daemon",
        "vllm preload: the daemon's process is told of the format by the configuration that it is given",
        keywords=("vllm_config",),
        required=False,
    ),
    Expected(
        "vllm.entrypoints.cli.preload:PreloadSubcommand.cmd",
        "vllm preload: the configuration goes to a spawned process",
        calls=("from_cli_args", "create_engine_config", "get_context", "Process"),
        says=("spawn",),
        required=False,
    ),
    Expected(
        "vllm.snapshot.server:run_vllm_snapshot_child",
        "vllm snapshot: saves end before the engine is captured",
        calls=("build_async_engine_client",),
        required=False,
    ),
    Expected(
        "vllm.snapshot.runtime:LocalSnapshotTools.launch_child",
        "vllm snapshot: the captured engine is known by the module that it runs",
        says=("vllm.snapshot.server",),
        required=False,
    ),
)
