"""Settings: the layers, where each value came from, and what is said about what is wrong."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ByteSize

from engine_loader import SettingsError
from engine_loader.settings import (
    KNOWN_NAMES,
    LoaderSettings,
    ResolvedSettings,
    Settings,
    describe_settings,
    load_settings,
    setting_value,
    show_value,
    variable_name,
)

EXTRA = "--model-loader-extra-config"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def resolve(
    yaml: str | None = None, config: Path | None = None, extra: dict[str, Any] | None = None, **environ: str
) -> ResolvedSettings:
    if yaml is not None:
        assert config is not None
        config.write_text(yaml)
        environ["ENGINE_LOADER_CONFIG"] = str(config)
    return load_settings(extra, environ)


def refusal(yaml: str | None = None, config: Path | None = None, extra: Any = None, **environ: str) -> str:
    """The message with which these settings are refused."""
    with pytest.raises(SettingsError) as caught:
        resolve(yaml, config, extra, **environ)
    return str(caught.value)


class TestLayers:
    def test_without_any_layer_all_values_are_defaults_and_nothing_has_an_origin(self) -> None:
        resolved = load_settings(environ={})
        assert resolved.settings == Settings()
        assert resolved.origins == {}

    def test_each_layer_overrides_the_one_before(self, config: Path) -> None:
        yaml = "loader:\n  threads: 1\n  max_tries: 1\n  engine: cpp\n  io_bytes: 1MiB\n"
        resolved = resolve(
            yaml,
            config,
            {"threads": 4},
            FASTSAFETENSORS_BACKEND="python",
            ENGINE_LOADER_LOADER__THREADS="3",
            ENGINE_LOADER_LOADER__MAX_TRIES="3",
        )
        loader = resolved.settings.loader
        assert (loader.threads, loader.max_tries, loader.engine, loader.io_bytes) == (4, 3, "python", 1 << 20)
        assert resolved.origins == {
            "loader.threads": EXTRA,
            "loader.max_tries": "ENGINE_LOADER_LOADER__MAX_TRIES",
            "loader.engine": "FASTSAFETENSORS_BACKEND",
            "loader.io_bytes": f"{config}:5",
        }

    def test_our_own_variable_overrides_an_earlier_tools(self) -> None:
        resolved = resolve(FASTSAFETENSORS_BACKEND="python", ENGINE_LOADER_LOADER__ENGINE="cpp")
        assert resolved.settings.loader.engine == "cpp"
        assert resolved.origins == {"loader.engine": "ENGINE_LOADER_LOADER__ENGINE"}

    def test_the_extra_config_takes_numbers_texts_and_sizes(self) -> None:
        loader = load_settings({"threads": 8, "deadline_s": 2, "buffer_bytes": "1.5GiB"}, {}).settings.loader
        assert (loader.threads, loader.deadline_s, loader.buffer_bytes) == (8, 2.0, 3 << 29)

    def test_none_and_empty_variables_set_nothing(self, config: Path) -> None:
        resolved = resolve(
            "debug:\nloader:\n  threads:\n",
            config,
            {"threads": None},
            ENGINE_LOADER_DEBUG="",
            FASTSAFETENSORS_BACKEND=" ",
        )
        assert resolved.settings == Settings()
        assert resolved.origins == {}

    @pytest.mark.parametrize("yaml", ["", "# nothing\n", "loader:\n", "loader: {}\n"])
    def test_a_file_that_sets_nothing_is_fine(self, yaml: str, config: Path) -> None:
        assert resolve(yaml, config).settings == Settings()

    def test_auto_can_be_said_for_what_is_chosen_by_itself_and_overrides(self, config: Path) -> None:
        resolved = resolve("loader:\n  threads: 4\n", config, ENGINE_LOADER_LOADER__THREADS="auto")
        assert resolved.settings.loader.threads is None
        assert resolved.origins["loader.threads"] == "ENGINE_LOADER_LOADER__THREADS"

    def test_home_is_expanded_in_the_path_of_the_file(self, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config.write_text("debug: true\n")
        monkeypatch.setenv("HOME", str(config.parent))
        assert load_settings(environ={"ENGINE_LOADER_CONFIG": "~/settings.yaml"}).settings.debug

    def test_the_process_environment_is_what_counts_when_none_is_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ENGINE_LOADER_LOADER__MAX_TRIES", "7")
        assert load_settings().settings.loader.max_tries == 7


class TestKnownNames:
    """Names that users of earlier tools know."""

    @pytest.mark.parametrize(
        ("variable", "value", "name", "expected"),
        [
            ("FASTSAFETENSORS_BACKEND", "cpp", "loader.engine", "cpp"),
            ("FASTSAFETENSORS_BACKEND", " Python ", "loader.engine", "python"),
            ("FASTSAFETENSORS_BACKEND", "mock", "loader.engine", "mock"),
            ("FASTSAFETENSORS_DEBUG", "true", "debug", True),
            ("FASTSAFETENSORS_DEBUG", "0", "debug", False),
        ],
    )
    def test_they_set_what_they_used_to(self, variable: str, value: str, name: str, expected: object) -> None:
        resolved = load_settings(environ={variable: value})
        assert setting_value(resolved.settings, name) == expected
        assert resolved.origins == {name: variable}

    def test_every_one_of_them_sets_a_setting_that_exists(self) -> None:
        assert set(KNOWN_NAMES.values()) <= {name for name, _, _ in describe_settings()}

    def test_sizes_that_were_in_megabytes_still_are(self) -> None:
        for variable in (variable for variable in KNOWN_NAMES if variable.endswith("_MB")):
            value = setting_value(load_settings(environ={variable: "700"}).settings, KNOWN_NAMES[variable])
            assert value == 700 << 20, variable

    def test_a_bad_value_names_the_variable_that_was_set(self) -> None:
        message = refusal(FASTSAFETENSORS_BACKEND="rust")
        assert message.startswith("FASTSAFETENSORS_BACKEND: loader.engine = 'rust': ")
        assert "'cpp'" in message and "'python'" in message


class TestWhatIsWrong:
    """Every message says where, what, and what is valid."""

    def test_an_unknown_setting_in_the_file_is_named_with_its_line_and_the_nearest(self, config: Path) -> None:
        message = refusal("debug: true\nloader:\n  # how many\n  treads: 4\n", config)
        assert message.startswith(
            f"{config}:4: there is no setting loader.treads; did you mean loader.threads? (there are:"
        )
        assert "loader.buffer_bytes" in message

    def test_a_setting_without_its_group_is_found_in_it(self, config: Path) -> None:
        assert "did you mean loader.buffer_bytes?" in refusal("buffer_bytes: 1GiB\n", config)
        assert "did you mean ENGINE_LOADER_LOADER__BUFFER_BYTES?" in refusal(ENGINE_LOADER_BUFFER_BYTES="1GiB")

    def test_an_unknown_group_suggests_the_nearest(self, config: Path) -> None:
        message = refusal("loder:\n  threads: 4\n", config)
        assert message.startswith(f"{config}:1: there is no setting loder; did you mean loader")

    def test_a_bad_value_in_the_file_is_named_with_its_line(self, config: Path) -> None:
        message = refusal("loader:\n  engine: cpp\n  threads: many\n", config)
        assert message.startswith(f"{config}:3: loader.threads = 'many': ")

    def test_a_bad_value_is_reported_also_where_a_later_layer_overrides_it(self, config: Path) -> None:
        message = refusal("loader:\n  threads: many\n", config, ENGINE_LOADER_LOADER__THREADS="4")
        assert message.startswith(f"{config}:2: ")

    def test_an_unknown_variable_is_named_with_the_nearest(self) -> None:
        message = refusal(ENGINE_LOADER_LOADER__TREADS="4")
        assert message.startswith("ENGINE_LOADER_LOADER__TREADS: there is no such setting; ")
        assert "did you mean ENGINE_LOADER_LOADER__THREADS?" in message

    def test_a_variable_that_reaches_below_a_setting_is_unknown(self) -> None:
        assert refusal(ENGINE_LOADER_DEBUG__LEVEL="4").startswith(
            "ENGINE_LOADER_DEBUG__LEVEL: there is no such setting"
        )

    def test_a_bad_value_of_a_variable_names_the_variable(self) -> None:
        message = refusal(ENGINE_LOADER_LOADER__THREADS="0")
        assert (
            message == "ENGINE_LOADER_LOADER__THREADS: loader.threads = '0': Input should be greater than or equal to 1"
        )

    def test_the_extra_config_is_told_in_its_own_names(self) -> None:
        message = refusal(extra={"treads": 4})
        assert message.startswith(f"{EXTRA}: there is no setting treads; did you mean threads? (there are: backend, ")
        assert refusal(extra={"threads": "x"}).startswith(f"{EXTRA}: threads = 'x': ")
        assert "loader." not in message

    def test_the_extra_config_can_be_called_otherwise(self) -> None:
        with pytest.raises(SettingsError, match=r"^open_checkpoint: there is no setting foo"):
            load_settings({"foo": 1}, {}, extra_origin="open_checkpoint")

    @pytest.mark.parametrize("extra", [{"loader": {"threads": 1}}, {"a.b": 1}, {1: 1}, {"threads": {"x": 1}}, {"": 1}])
    def test_nothing_in_the_extra_config_makes_anything_but_a_settings_error(self, extra: Any) -> None:
        assert refusal(extra=extra).startswith(f"{EXTRA}: ")

    def test_all_that_is_wrong_is_told_at_once_a_line_each(self, config: Path) -> None:
        yaml = "debug: maybe\nloader:\n  engine: rust\n  foo: 1\n"
        message = refusal(yaml, config, {"bar": 1}, ENGINE_LOADER_LOADER__IO_BYTES="x", ENGINE_LOADER_NO="1")
        places = [line.partition(": ")[0] for line in message.splitlines()]
        assert sorted(places) == sorted(
            [f"{config}:1", f"{config}:3", f"{config}:4", "ENGINE_LOADER_LOADER__IO_BYTES", "ENGINE_LOADER_NO", EXTRA]
        )

    def test_a_value_instead_of_a_group_and_a_group_instead_of_a_value(self, config: Path) -> None:
        assert refusal("loader: fast\n", config) == (
            f"{config}:1: loader is a group of settings, not a setting: put them below it"
        )
        assert refusal("loader:\n  threads:\n    of: 4\n", config).startswith(f"{config}:2: loader.threads = ")

    @pytest.mark.parametrize("number", ["threads", "buffer_bytes", "max_tries", "deadline_s"])
    def test_true_is_no_number(self, number: str, config: Path) -> None:
        message = refusal(f"loader:\n  {number}: true\n", config)
        assert message.startswith(f"{config}:2: loader.{number} = True: ")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("threads", 0),
            ("threads", 257),
            ("threads", 1.5),
            ("buffer_bytes", "1 parsec"),
            ("buffer_bytes", -1),
            ("buffer_bytes", 10**30),
            ("block_bytes", 1),
            ("io_bytes", "2GiB"),
            ("max_tries", 0),
            ("deadline_s", 0),
            ("deadline_s", float("inf")),
            ("deadline_s", float("nan")),
            ("read_mode", "fast"),
            ("backend", "s4"),
        ],
    )
    def test_values_out_of_range_are_refused(self, name: str, value: object) -> None:
        assert refusal(extra={name: value}).startswith(f"{EXTRA}: {name} = ")

    def test_a_long_value_is_cut_in_the_message(self) -> None:
        assert len(refusal(extra={"threads": "9" * 5000})) < 400


class TestFile:
    """What can be wrong with the file itself."""

    @pytest.mark.parametrize(
        ("yaml", "expected"),
        [
            ("loader:\n  threads: [\n", "{path}:3: not valid YAML: "),
            ("loader:\n\tthreads: 1\n", "{path}:2: not valid YAML: "),
            ("debug: false\n---\ndebug: true\n", "{path}:2: not valid YAML: "),
            ("- debug\n", "{path}:1: the file is not a mapping of settings"),
            ("true\n", "{path}:1: the file is not a mapping of settings"),
            ("loader:\n  threads: 1\n  threads: 2\n", "{path}:3: loader.threads is set twice"),
            ("? [a]\n: 1\n", "{path}:1: a setting's name is a word"),
            ("loader:\n  threads: !!python/object:os.system x\n", "{path}:2: loader.threads: could not determine"),
            ("loader:\n  threads: 2001-99-99\n", "{path}:2: loader.threads: month must be in 1..12"),
            ("loader: &a\n  x: *a\n", "{path}:2: loader.x: found unconstructable recursive node"),
            ("loader: &a\n  <<: *a\n", "{path}:2: "),
            ("debug: \x01\n", "{path} is not valid YAML: "),
        ],
    )
    def test_the_message_names_file_and_line(self, yaml: str, expected: str, config: Path) -> None:
        assert refusal(yaml, config).startswith(expected.format(path=config))

    def test_a_group_that_contains_itself_ends(self, config: Path) -> None:
        assert str(config) in refusal("loader: &a\n  loader: *a\n", config)

    def test_deep_nesting_ends(self, config: Path) -> None:
        assert str(config) in refusal("a: " + "[" * 5000 + "]" * 5000, config)

    def test_bytes_that_are_no_text(self, config: Path) -> None:
        config.write_bytes(b"debug: \xff\n")
        assert refusal(ENGINE_LOADER_CONFIG=str(config)).startswith(f"{config} is not valid YAML: ")

    def test_a_file_that_is_not_there_and_one_that_is_a_directory(self, tmp_path: Path) -> None:
        missing = tmp_path / "missing.yaml"
        assert refusal(ENGINE_LOADER_CONFIG=str(missing)) == (
            f"ENGINE_LOADER_CONFIG: could not read {missing}: No such file or directory"
        )
        assert "Is a directory" in refusal(ENGINE_LOADER_CONFIG=str(tmp_path))


class TestEnvironment:
    def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_setting(self) -> None:
        environ = {
            "ENGINE_LOADER_SERVICE_HOST": "10.0.0.1",
            "ENGINE_LOADER_SERVICE_PORT": "8000",
            "ENGINE_LOADER_SERVICE_PORT_HTTP": "8000",
            "ENGINE_LOADER_PORT": "tcp://10.0.0.1:8000",
            "ENGINE_LOADER_PORT_8000_TCP": "tcp://10.0.0.1:8000",
            "ENGINE_LOADER_PORT_8000_TCP_ADDR": "10.0.0.1",
        }
        assert load_settings(environ=environ).settings == Settings()

    @pytest.mark.parametrize("service", ["STORE", "CONFIG", "LOADER", "COMPILE_CACHE", "LOADER__THREADS", "V2_API"])
    def test_what_kubernetes_sets_for_a_service_whose_name_begins_as_ours_is_no_setting(self, service: str) -> None:
        prefix = f"ENGINE_LOADER_{service}"
        environ = {
            f"{prefix}_SERVICE_HOST": "10.0.0.1",
            f"{prefix}_SERVICE_PORT": "6379",
            f"{prefix}_SERVICE_PORT_REDIS": "6379",
            f"{prefix}_PORT": "tcp://10.0.0.1:6379",
            f"{prefix}_PORT_6379_TCP": "tcp://10.0.0.1:6379",
            f"{prefix}_PORT_6379_TCP_PROTO": "tcp",
            f"{prefix}_PORT_6379_TCP_PORT": "6379",
            f"{prefix}_PORT_6379_TCP_ADDR": "10.0.0.1",
        }
        assert load_settings(environ=environ).settings == Settings()

    def test_a_misspelt_setting_beside_a_service_is_told(self) -> None:
        environ = {"ENGINE_LOADER_STORE_PORT": "tcp://10.0.0.1:6379", "ENGINE_LOADER_LOADER__THREDS": "4"}
        with pytest.raises(SettingsError, match="ENGINE_LOADER_LOADER__THREDS") as caught:
            load_settings(environ=environ)
        assert "STORE_PORT" not in str(caught.value)

    def test_what_is_for_building_the_package_is_no_setting(self) -> None:
        assert load_settings(environ={"ENGINE_LOADER_NATIVE_BUILD": "require"}).settings == Settings()

    @pytest.mark.parametrize("name", [name for name, _, _ in describe_settings()])
    def test_every_setting_has_a_variable_that_takes_its_default_as_it_is_shown(self, name: str) -> None:
        default = setting_value(Settings(), name)
        resolved = load_settings(environ={variable_name(name): show_value(default)})
        assert setting_value(resolved.settings, name) == default
        assert resolved.origins == {name: variable_name(name)}


class TestDescription:
    def test_every_setting_is_described(self) -> None:
        described = {name: (default, text) for name, default, text in describe_settings()}
        assert described["loader.buffer_bytes"][0] == "512 MiB"
        assert {f"loader.{name}" for name in LoaderSettings.model_fields} <= set(described)
        for name, (_, text) in described.items():
            assert text.endswith("."), name

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (None, "auto"),
            (True, "true"),
            (120.0, "120"),
            (0.5, "0.5"),
            ("cpp", "cpp"),
            (ByteSize(0), "0"),
            (ByteSize(1000), "1000"),
            (ByteSize(1024), "1 KiB"),
            (ByteSize(1536), "1536"),
            (ByteSize(3 << 30), "3 GiB"),
        ],
    )
    def test_values_are_shown_as_a_person_writes_them(self, value: object, shown: str) -> None:
        assert show_value(value) == shown


class TestKeyMapping:
    """Of a training checkpoint; it takes expressions or a function."""

    def test_it_is_read_from_every_layer_and_a_later_one_takes_its_whole_place(self, config: Path) -> None:
        yaml = 'loader:\n  key_mapping:\n    "^model[.]": ""\n    a: b\n'
        resolved = resolve(yaml, config)
        assert resolved.settings.loader.key_mapping == {"^model[.]": "", "a": "b"}
        assert resolved.origins == {"loader.key_mapping": f"{config}:2"}
        resolved = resolve(yaml, config, ENGINE_LOADER_LOADER__KEY_MAPPING='{"^net[.]": "model."}')
        assert resolved.settings.loader.key_mapping == {"^net[.]": "model."}
        resolved = resolve(yaml, config, {"key_mapping": {"x": "y"}})
        assert resolved.settings.loader.key_mapping == {"x": "y"}
        assert resolve(yaml, config, {"key_mapping": "auto"}).settings.loader.key_mapping is None

    def test_a_function_is_named_and_not_imported(self) -> None:
        loader = resolve(ENGINE_LOADER_LOADER__KEY_MAPPING="no.such.module:rename").settings.loader
        assert loader.key_mapping == "no.such.module:rename"

    def test_it_is_shown_in_a_form_that_can_be_given_back(self) -> None:
        mapping = {"^model[.](\\d+)": "\\1"}
        shown = show_value(resolve(extra={"key_mapping": mapping}).settings.loader.key_mapping)
        assert resolve(ENGINE_LOADER_LOADER__KEY_MAPPING=shown).settings.loader.key_mapping == mapping

    @pytest.mark.parametrize(
        ("value", "told"),
        [
            ('{"(": ""}', "'(' is not a regular expression: missing )"),
            ('{"a": 1}', 'this takes regular expressions with their replacements ({"^model[.]": ""}), or "module:'),
            ("{a}", "this is not valid JSON"),
            ("a module", "this takes regular expressions"),
            ("module:", "this takes regular expressions"),
        ],
    )
    def test_what_is_none_is_refused(self, value: str, told: str) -> None:
        message = refusal(ENGINE_LOADER_LOADER__KEY_MAPPING=value)
        assert message.startswith("ENGINE_LOADER_LOADER__KEY_MAPPING: loader.key_mapping = ")
        assert told in message

    def test_a_bad_value_in_the_file_is_told_with_its_line(self, config: Path) -> None:
        assert refusal("loader:\n  key_mapping:\n    a: [b]\n", config).startswith(f"{config}:2: loader.key_mapping = ")
        assert refusal("loader:\n  key_mapping: true\n", config).startswith(f"{config}:2: loader.key_mapping = ")


class TestTemplate:
    @pytest.mark.parametrize(("written", "value"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("no", "off")])
    def test_the_words_of_yaml_for_true_and_false_are_on_and_off(self, written: str, value: str, config: Path) -> None:
        assert resolve(f"start:\n  template: {written}\n", config).settings.start.template == value

    def test_other_values_are_refused(self) -> None:
        assert "'auto', 'on' or 'off'" in refusal(ENGINE_LOADER_START__TEMPLATE="always")
