"""What the adapter of SGLang relies on."""

from .expectations import Expected

_LOADER = "sglang.srt.model_loader.loader:DefaultModelLoader"
_ARGUMENTS = "sglang.srt.server_args:ServerArgs"
_SCHEDULER = "sglang.srt.managers.scheduler"
_SERVER = "sglang.srt.entrypoints.http_server"
_ENGINE = "sglang.srt.entrypoints.engine"

_FORMAT = "the format is one of SGLang's choices"
_FILES = "the loader class replaces the iterators over safetensors files"
_OVERRIDE = "the loader class overrides it and calls it"
_CACHE = "the compile cache is restored before warm-up and saved after it"
_SHARDED = "sharded_state checkpoints"

PRESENT = (
    Expected("sglang.srt.plugins:load_plugins", "plugins are loaded; before, a patch is needed", required=False),
    Expected("sglang.srt.server_args:add_load_format_choices", _FORMAT),
    Expected("sglang.srt.server_args:LOAD_FORMAT_CHOICES", _FORMAT),
    Expected(f"{_ARGUMENTS}.from_cli_args", "models in a bucket", takes=("args",)),
    Expected("sglang.srt.configs.load_config:LoadConfig._verify_load_format", _FORMAT),
    Expected("sglang.srt.configs.load_config:LoadConfig.load_format", _FORMAT),
    Expected("sglang.srt.configs.load_config:LoadConfig.model_loader_extra_config", "options of this package"),
    Expected("sglang.srt.configs.load_config:LoadConfig.draft_model_idx", _FILES),
    Expected("sglang.srt.configs.load_config:LoadFormat.AUTO", "the loader passes for a format of SGLang's"),
    Expected("sglang.srt.configs.load_config:LoadFormat.MISTRAL", "Mistral's own files", required=False),
    Expected("sglang.srt.model_loader.loader:get_model_loader", "a class is taken for a format", calls=("isinstance",)),
    Expected(f"{_LOADER}.__init__", _OVERRIDE, takes=("load_config",)),
    Expected(f"{_LOADER}.load_model", _OVERRIDE, keywords=("model_config", "device_config")),
    Expected(f"{_LOADER}.load_weights_and_postprocess", _OVERRIDE, takes=("model", "weights", "target_device")),
    Expected(
        f"{_LOADER}._get_weights_iterator",
        _FILES,
        takes=("source",),
        calls=(
            "buffered_multi_thread_safetensors_weights_iterator",
            "safetensors_weights_iterator",
            "_prepare_weights",
        ),
    ),
    Expected(f"{_LOADER}._filter_mtp_weights", _FILES, takes=("weights_iterator", "prefix", "draft_model_idx")),
    Expected(f"{_LOADER}._prepare_weights", "which files are a model's", says=("*.safetensors", "*.bin")),
    Expected(f"{_LOADER}.Source.model_or_path", _FILES),
    Expected(f"{_LOADER}.Source.prefix", _FILES),
    Expected(f"{_LOADER}.Source.model_config", _FILES, required=False),
    Expected("sglang.srt.model_loader.loader:maybe_add_mtp_safetensors", _FILES, required=False),
    Expected("sglang.srt.model_loader.loader:ShardedStateLoader._filter_subtensors", _SHARDED, takes=("tensors",)),
    Expected(
        "sglang.srt.model_loader.loader:post_load_weights or sglang.srt.model_loader.loader:_post_load_weights",
        _SHARDED,
        keywords=("model",),
    ),
    Expected("sglang.srt.distributed.parallel_state:get_pp_group", _SHARDED),
    Expected("sglang.srt.distributed.parallel_state:get_tp_group", _SHARDED),
    Expected(f"{_SCHEDULER}:Scheduler.init_model_worker", _CACHE),
    Expected(f"{_SCHEDULER}:Scheduler.server_args", _CACHE),
    Expected(f"{_SCHEDULER}:run_scheduler_process", "the plugin is loaded in each rank"),
    Expected(f"{_SERVER}:_wait_and_warmup", _CACHE, takes=("server_args",)),
    Expected(f"{_SERVER}:_global_state", _CACHE),
    Expected(
        f"{_ENGINE}:Engine._launch_subprocesses or {_ENGINE}:_launch_subprocesses", _CACHE, keywords=("server_args",)
    ),
    Expected(f"{_ENGINE}:Engine.__init__", _CACHE),
    Expected(f"{_ENGINE}:Engine.server_args", _CACHE),
    Expected(
        "sglang.srt.disaggregation.encoder.grpc_server:launch_encoder or "
        "sglang.srt.disaggregation.encoder.runtime:launch_encoder",
        "encoder workers are told of the format by the options that they are given",
        keywords=("server_args",),
        required=False,
    ),
    Expected(
        "sglang.srt.elastic_ep.expert_backup_manager:run_expert_backup_manager_process",
        "the expert backup is told of the format by the options that it is given",
        keywords=("server_args",),
        required=False,
    ),
    Expected(
        "sglang.srt.model_executor.model_runner_components.startup_weight_load:StartupWeightLoadManager."
        "_get_unsupported_reason",
        "--startup-weight-load-mode overlap is refused with the reason",
        says=("DefaultModelLoader only",),
        required=False,
    ),
)
