import inspect
import json
import logging
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ViTConfig

from sqakd_hf import InputError, QuantizationConfig
from sqakd_hf.conversion.config import check_patterns, matches


BITS = "must be an integer from 1 to 8, got {!r}. To keep a layer in full precision add it to modules_to_not_convert."
BAD_BITS = [0, 9, -1, 2.5, 4.0, "four", "4", True, False, [4]]


def error_of(**fields):
    with pytest.raises(InputError) as info:
        QuantizationConfig(**fields)
    return str(info.value)


class TestDefaults:
    def test_are_two_bit_lsq_with_eight_bits_at_the_ends(self):
        config = QuantizationConfig()
        assert (config.quantizer, config.weight_bits, config.activation_bits, config.first_last_bits) == (
            "lsq",
            2,
            2,
            8,
        )
        assert config.per_channel is True and config.integer_zero_point is True
        assert not config.overrides and not config.modules_to_not_convert and not config.quantizer_kwargs
        assert (config.quant_method, config.format_version, config.stored) == ("sqakd", 2, None)

    def test_are_not_shared_between_configs(self):
        QuantizationConfig().modules_to_not_convert.append("head")
        QuantizationConfig().overrides["fc"] = {"weight_bits": 4}
        QuantizationConfig().quantizer_kwargs["delta"] = 1.0
        assert QuantizationConfig() == QuantizationConfig(
            overrides=None, modules_to_not_convert=None, quantizer_kwargs=None
        )

    def test_a_saved_config_spells_them_out(self):
        saved = json.loads(QuantizationConfig().to_json_string())
        assert set(saved) == set(inspect.signature(QuantizationConfig).parameters)
        assert saved["weight_bits"] == 2 and saved["first_last_bits"] == 8 and saved["integer_zero_point"] is True

    def test_quant_method_does_not_take_the_place_of_the_first_argument(self):
        # The mixin's dataclass declares quant_method before any of our fields.
        first = next(iter(inspect.signature(QuantizationConfig).parameters.values()))
        assert first.name == "quantizer" or first.kind is inspect.Parameter.KEYWORD_ONLY


class TestValidation:
    @pytest.mark.parametrize("bits", range(1, 9))
    def test_one_to_eight_bits_are_accepted(self, bits):
        config = QuantizationConfig(weight_bits=bits, activation_bits=bits, first_last_bits=bits)
        assert config.weight_bits == config.activation_bits == config.first_last_bits == bits

    @pytest.mark.parametrize("bits", [*BAD_BITS, None], ids=repr)
    def test_other_weight_bits_are_not(self, bits):
        assert error_of(weight_bits=bits) == "weight_bits " + BITS.format(bits)

    @pytest.mark.parametrize("bits", BAD_BITS, ids=repr)
    def test_other_activation_bits_are_not(self, bits):
        named = "activation_bits (None leaves activations in float) "
        assert error_of(activation_bits=bits) == named + BITS.format(bits)

    @pytest.mark.parametrize("bits", BAD_BITS, ids=repr)
    def test_other_first_last_bits_are_not(self, bits):
        named = "first_last_bits (None leaves both layers in full precision) "
        assert error_of(first_last_bits=bits) == named + BITS.format(bits)

    def test_none_leaves_activations_or_the_ends_in_float(self):
        config = QuantizationConfig(activation_bits=None, first_last_bits=None)
        assert config.activation_bits is None and config.first_last_bits is None

    @pytest.mark.parametrize("field", ["per_channel", "integer_zero_point"])
    @pytest.mark.parametrize("value", [None, 1, 0, "yes"], ids=repr)
    def test_switches_are_booleans(self, field, value):
        assert error_of(**{field: value}) == f"{field} must be True or False, got {value!r}."

    @pytest.mark.parametrize(
        ("name", "close"),
        [("lsqq", "'lsq' or 'lsq+'"), ("dorefaa", "'dorefa'"), ("EWGS", ""), ("", ""), (None, ""), (3, "")],
        ids=repr,
    )
    def test_an_unknown_quantizer_is_named_with_close_ones(self, name, close):
        message = error_of(quantizer=name)
        assert message.startswith(f"Unknown quantizer {name!r}; registered: ")
        assert all(known in message for known in ("dorefa", "ewgs", "lsq", "lsq+", "pact", "statsq"))
        assert message.endswith(f" Did you mean {close}?" if close else ".")

    def test_another_quant_method_is_refused(self):
        assert error_of(quant_method="gptq") == "quant_method must be 'sqakd', got 'gptq'."

    @pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None], ids=repr)
    def test_format_version_is_a_positive_integer(self, version):
        expected = f"format_version must be an integer of at least 1, got {version!r}."
        assert error_of(format_version=version) == expected
        with pytest.raises(InputError, match=re.escape(expected)):
            QuantizationConfig.from_dict({"format_version": version})

    @pytest.mark.parametrize("value", ["head", [1], ["head", None], 5], ids=repr)
    def test_modules_to_not_convert_is_a_list_of_names(self, value):
        assert error_of(modules_to_not_convert=value) == (
            f"modules_to_not_convert must be a list of names, got {value!r}."
        )

    @pytest.mark.parametrize("kind", [tuple, iter], ids=["tuple", "iterator"])
    def test_other_sequences_of_names_become_a_list_and_lose_none(self, kind):
        config = QuantizationConfig(modules_to_not_convert=kind(["head", "stem.*"]))
        assert config.modules_to_not_convert == ["head", "stem.*"]

    @pytest.mark.parametrize("field", ["weight_bit", "overides", "modules_not_to_convert"])
    def test_a_misspelt_argument_raises_and_is_named(self, field):
        with pytest.raises(TypeError, match=field):
            QuantizationConfig(**{field: 4})


class TestOverrides:
    def test_any_layer_option_is_accepted(self):
        options = {
            "quantizer": "ewgs",
            "weight_bits": 1,
            "activation_bits": None,
            "per_channel": False,
            "integer_zero_point": False,
            "quantizer_kwargs": {"delta": 0.5},
        }
        config = QuantizationConfig(overrides={"layer1.*": options, "fc": {}})
        assert config.overrides["layer1.*"] == options and config.overrides["fc"] == {}

    @pytest.mark.parametrize("value", [["fc"], "fc", 4], ids=repr)
    def test_must_be_a_mapping(self, value):
        assert error_of(overrides=value) == f"overrides must map name patterns to options, got {value!r}."

    @pytest.mark.parametrize("value", [4, None, ["weight_bits", 4]], ids=repr)
    def test_of_a_pattern_must_be_a_dict(self, value):
        assert error_of(overrides={"fc": value}) == f"overrides['fc'] must be a dict of layer options, got {value!r}."

    def test_have_names_for_patterns(self):
        # JSON would turn the key into "1": the config would not equal itself after a round trip.
        assert "overrides" in error_of(overrides={1: {"weight_bits": 4}})

    @pytest.mark.parametrize(
        ("key", "close"),
        [
            ("weight_bit", "'weight_bits'"),
            ("first_last_bits", ""),
            ("activation_bit", "'activation_bits'"),
            ("xyz", ""),
        ],
    )
    def test_an_unknown_option_is_named_with_close_ones(self, key, close):
        message = error_of(overrides={"fc": {key: 4}})
        accepted = "quantizer, activation_quantizer, weight_bits, activation_bits, per_channel, integer_zero_point"
        accepted += ", quantizer_kwargs, attention_bits"
        assert message.startswith(f"overrides['fc'] has the unknown option {key!r}; accepted: {accepted}.")
        assert f"Did you mean {close}" in message if close else message.endswith("attention_bits.")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weight_bits": 9}, "weight_bits " + BITS.format(9)),
            ({"weight_bits": None}, "weight_bits " + BITS.format(None)),
            (
                {"activation_bits": True},
                "activation_bits (None leaves activations in float) " + BITS.format(True),
            ),
            ({"per_channel": 1}, "per_channel must be True or False, got 1."),
            ({"integer_zero_point": "no"}, "integer_zero_point must be True or False, got 'no'."),
            ({"quantizer_kwargs": [1]}, "quantizer_kwargs must be a dict that JSON can hold, got [1]."),
            ({"quantizer": "pacct"}, "Unknown quantizer 'pacct'; registered: "),
        ],
        ids=lambda value: str(value)[:30],
    )
    def test_errors_name_the_pattern(self, options, message):
        assert error_of(overrides={"fc": options}).startswith(f"overrides['fc']: {message}")

    @pytest.mark.parametrize(
        "options",
        [{"quantizer": "lsq"}, {"quantizer_kwargs": {"unit_rnage": True}}, {"quantizer_kwargs": {"delta": -1}}],
        ids=["inherited", "unknown", "bad value"],
    )
    def test_errors_of_the_quantizer_name_the_pattern(self, options):
        # "inherited": LSQ meets the unit_range that was meant for DoReFa.
        message = error_of(quantizer="dorefa", quantizer_kwargs={"unit_range": True}, overrides={"fc": options})
        assert "overrides['fc']" in message


class TestQuantizerKwargs:
    @pytest.mark.parametrize(
        "value",
        [{"delta": float("nan")}, {1: 2}, {"a": (1, 2)}, {"a": {1, 2}}, {"a": object}, [("delta", 0.0)], "delta"],
        ids=["nan", "key", "tuple", "set", "class", "list", "string"],
    )
    def test_must_survive_json(self, value):
        assert error_of(quantizer_kwargs=value) == (
            f"quantizer_kwargs must be a dict that JSON can hold, got {value!r}."
        )

    @pytest.mark.parametrize(
        ("quantizer", "kwargs"),
        [("lsq", {"unit_range": True}), ("ewgs", {"dleta": 0.1}), ("pact", {"unit_range": True})],
        ids=["of another method", "misspelt", "of one role only"],
    )
    def test_an_option_that_the_quantizer_does_not_take_is_named(self, quantizer, kwargs):
        (option,) = kwargs
        assert f"Quantizer {quantizer!r} can't take the options ['{option}']" in error_of(
            quantizer=quantizer, quantizer_kwargs=kwargs
        )

    @pytest.mark.parametrize("delta", [-0.1, "0.1", True, None], ids=repr)
    def test_a_value_that_the_quantizer_does_not_take_is_named(self, delta):
        assert f"delta must be a non-negative number, got {delta!r}" in error_of(quantizer_kwargs={"delta": delta})

    @pytest.mark.parametrize(
        "option", ["name", "bits", "role", "signed", "channel_axis", "num_channels", "integer_zero_point"]
    )
    def test_what_the_config_itself_decides_is_no_option(self, option):
        # create_quantizer gets these from the plan: a second value would crash in it, or contradict the plan.
        assert option in error_of(quantizer_kwargs={option: 1})


# --- JSON ------------------------------------------------------------------------------------------------------------

NUMBERS = st.integers(1, 8)
PATTERNS = st.text("abc01.*?", min_size=1, max_size=8)
DELTA = st.fixed_dictionaries({}, optional={"delta": st.floats(0, 10) | st.integers(0, 3)})
OVERRIDE = st.fixed_dictionaries(
    {},
    optional={
        "quantizer": st.sampled_from(["dorefa", "ewgs", "lsq", "lsq+", "pact", "statsq"]),
        "weight_bits": NUMBERS,
        "activation_bits": st.none() | NUMBERS,
        "per_channel": st.booleans(),
        "integer_zero_point": st.booleans(),
        "quantizer_kwargs": DELTA,
    },
)
CONFIGS = st.builds(
    QuantizationConfig,
    quantizer=st.sampled_from(["dorefa", "ewgs", "lsq", "lsq+", "pact", "statsq"]),
    weight_bits=NUMBERS,
    activation_bits=st.none() | NUMBERS,
    per_channel=st.booleans(),
    first_last_bits=st.none() | NUMBERS,
    attention_bits=st.none() | NUMBERS,
    residual_bits=st.none() | NUMBERS,
    overrides=st.dictionaries(PATTERNS, OVERRIDE, max_size=3),
    modules_to_not_convert=st.lists(PATTERNS, max_size=3),
    quantizer_kwargs=DELTA,
    integer_zero_point=st.booleans(),
)


def through_dict(config, _):
    return QuantizationConfig.from_dict(config.to_dict())


def through_string(config, _):
    return QuantizationConfig.from_dict(json.loads(config.to_json_string()))


def through_whole_string(config, _):
    return QuantizationConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))


def through_file(config, folder):
    config.to_json_file(folder / "quantization.json")
    return QuantizationConfig.from_dict(json.loads((folder / "quantization.json").read_text()))


def through_model_config(config, folder):
    """As `save_pretrained` does: inside the model's `config.json`."""
    model_config = ViTConfig()
    model_config.quantization_config = config
    model_config.save_pretrained(folder)
    return QuantizationConfig.from_dict(ViTConfig.from_pretrained(folder).quantization_config)


ROUND_TRIPS = [through_dict, through_string, through_whole_string, through_file, through_model_config]


class TestJson:
    @pytest.mark.parametrize("round_trip", ROUND_TRIPS, ids=lambda f: f.__name__)
    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        # The folder is overwritten by each example.
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(config=CONFIGS)
    def test_a_config_equals_itself_after_a_round_trip(self, round_trip, tmp_path, config):
        loaded = round_trip(config, tmp_path)
        assert loaded == config and type(loaded) is QuantizationConfig
        # == lets True pass for 1.
        assert json.loads(loaded.to_json_string()) == json.loads(config.to_json_string())
        assert repr(loaded.weight_bits) == repr(config.weight_bits) and type(loaded.per_channel) is bool

    @pytest.mark.parametrize("round_trip", ROUND_TRIPS, ids=lambda f: f.__name__)
    def test_overrides_keep_their_order(self, round_trip, tmp_path):
        # Later patterns overrule earlier ones, and transformers sorts keys when it writes JSON.
        config = QuantizationConfig(overrides={"layer1": {"weight_bits": 4}, "*.conv1": {"weight_bits": 3}})
        assert list(dict(round_trip(config, tmp_path).overrides)) == ["layer1", "*.conv1"]

    def test_a_changed_dict_does_not_change_the_config(self):
        config = QuantizationConfig(overrides={"fc": {"weight_bits": 4}}, modules_to_not_convert=["stem"])
        changed = config.to_dict()
        changed["overrides"] = None
        changed["modules_to_not_convert"].append("head")
        assert config == QuantizationConfig(overrides={"fc": {"weight_bits": 4}}, modules_to_not_convert=["stem"])

    def test_from_dict_leaves_its_argument_as_it_was(self):
        given = {"weight_bits": 4, "format_version": 7, "newer": 1}
        QuantizationConfig.from_dict(given)
        assert given == {"weight_bits": 4, "format_version": 7, "newer": 1}

    def test_missing_keys_are_the_defaults(self):
        assert QuantizationConfig.from_dict({}) == QuantizationConfig()
        assert QuantizationConfig.from_dict({"weight_bits": 5}) == QuantizationConfig(weight_bits=5)

    def test_from_dict_validates(self):
        with pytest.raises(InputError, match=re.escape("weight_bits " + BITS.format(9))):
            QuantizationConfig.from_dict({"weight_bits": 9})

    def test_from_dict_takes_fields_as_keywords_and_returns_the_rest(self):
        config, rest = QuantizationConfig.from_dict(
            {"weight_bits": 3}, return_unused_kwargs=True, weight_bits=4, revision="main"
        )
        assert config == QuantizationConfig(weight_bits=4) and rest == {"revision": "main"}
        with pytest.raises(InputError, match="activation_bits"):
            QuantizationConfig.from_dict({}, activation_bits=0)

    def test_unknown_keys_are_an_error_that_names_all_and_close_ones(self):
        with pytest.raises(InputError) as info:
            QuantizationConfig.from_dict({"zzz": 1, "weight_bit": 4, "format_version": 1})
        assert str(info.value) == "Unknown quantization config keys: weight_bit, zzz. Did you mean 'weight_bits'?"

    def test_a_newer_version_is_read_with_one_warning_that_names_what_is_ignored(self, caplog):
        with caplog.at_level(logging.INFO, logger="sqakd_hf"):
            config = QuantizationConfig.from_dict(
                {"format_version": 3, "weight_bits": 4, "sparsity": 0.5, "blocks": [16]}
            )
        assert config.weight_bits == 4
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert caplog.messages == [
            "This quantization config has format version 3, this sqakd_hf reads up to 2 and ignores: "
            "blocks, sparsity. Upgrade with `pip install -U sqakd_hf`."
        ]

    def test_weights_stored_in_a_newer_format_are_refused(self):
        with pytest.raises(InputError, match="format version 3, this sqakd_hf reads up to 2. Upgrade"):
            QuantizationConfig.from_dict({"format_version": 3, "stored": {"format": "denser"}})

    def test_a_newer_version_without_new_keys_says_so(self, caplog):
        QuantizationConfig.from_dict({"format_version": 3})
        assert "ignores: nothing." in caplog.text

    def test_the_own_version_is_silent(self, caplog):
        with caplog.at_level(logging.INFO, logger="sqakd_hf"):
            QuantizationConfig.from_dict({"format_version": 1})
        assert not caplog.records


class TestMatches:
    @pytest.mark.parametrize(
        ("name", "pattern"),
        [
            ("fc", "fc"),
            ("timm_model.fc", "fc"),
            ("layer1.0.conv1", "layer1"),
            ("timm_model.layer1.0.conv1", "layer1"),
            ("timm_model.layer1.0.conv1", "layer1.0"),
            ("layer2.0.conv1", "layer?.0.conv1"),
            ("layer1.0.conv1", "conv?"),
            ("blocks.0.attn.qkv", "attn"),
            ("blocks.11.attn.qkv", "blocks.*.qkv"),
            ("layer1.0.conv1", "layer1*conv1"),
            ("vit.layers.0.mlp.fc1", "layers.0.*"),
            ("stem.0", "*"),
            ("head", "h*d"),
        ],
    )
    def test_a_run_of_parts_of_the_name(self, name, pattern):
        assert matches(name, pattern)

    @pytest.mark.parametrize(
        ("name", "pattern"),
        [
            ("layer10.0.conv1", "layer1"),
            ("blocks.10.mlp.fc1", "blocks.1"),
            ("fc_norm", "fc"),
            ("my_fc", "fc"),
            ("layer2.1.conv1", "layer?.0.conv1"),
            ("layer12.0.conv1", "layer?.0.conv1"),
            ("Layer1.conv1", "layer1"),
            ("a.b", "b.a"),
            ("a.b", "a.b.c"),
            ("a.b.c", "a.c"),
            ("layer1", "layer."),
            ("layer1", "layer[0-9]+"),
            ("head", ""),
        ],
    )
    def test_nothing_else(self, name, pattern):
        assert not matches(name, pattern)

    def test_patterns_that_match_pass_the_check(self):
        check_patterns(["stem", "b?dy", "*"], ["stem.0", "body.0", "head"], "overrides")

    def test_a_pattern_that_matches_nothing_names_close_ones(self):
        with pytest.raises(InputError) as info:
            check_patterns(["stem", "haed"], ["stem.0", "body.0", "head"], "modules_to_not_convert")
        assert str(info.value) == ("modules_to_not_convert: the pattern 'haed' matches no layer; close names: head.")

    def test_without_close_names_it_shows_the_first_layers(self):
        with pytest.raises(InputError) as info:
            check_patterns(["zzzzz"], ["a.conv", "b.conv", "c.conv", "d.conv"], "overrides")
        assert str(info.value) == (
            "overrides: the pattern 'zzzzz' matches no layer; the first layers are: a.conv, b.conv, c.conv."
        )


@pytest.mark.parametrize("bits", [0, 9, True, 2.0, "8"])
def test_attention_bits_are_checked_where_they_are_set(bits):
    assert error_of(attention_bits=bits).startswith("attention_bits (None leaves attention's products in float) ")
    assert error_of(overrides={"fc": {"attention_bits": bits}}).startswith("overrides['fc']: attention_bits ")
