"""The ready-made configurations: accelerate reads them, and knows every key."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.helpers.paths import ROOT


CONFIGS = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    config = load_config_from_file(str(path))  # raises for keys that it does not know
    assert config.distributed_type.value in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for section in ("fsdp_config", "deepspeed_config"):
        assert not set(getattr(config, section)) - set(known)
    assert str(path.relative_to(path.parents[2])) in path.read_text()  # the command in its head


def test_fsdp_gets_what_the_file_says():
    path = next(path for path in CONFIGS if path.stem == "fsdp2_bf16")
    args, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "--num_processes", "2", "script.py"])
    )
    assert (args.use_fsdp, args.fsdp_version, args.mixed_precision) == (True, 2, "bf16")
    assert (args.fsdp_auto_wrap_policy, args.fsdp_state_dict_type) == ("SIZE_BASED_WRAP", "FULL_STATE_DICT")
