"""Students on the Hub: the real client against a server that speaks the Hub's API."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load

from tests.helpers.hub_server import TOKEN, HubServer


pytestmark = pytest.mark.process


PREPARE = """
import os, sys, torch
from pathlib import Path
import sqakd_hf
from sqakd_hf import *
from sqakd_hf.errors import UploadError
from tests.helpers.models import CLASSES, tiny_vit
from transformers import AutoModelForImageClassification, AutoImageProcessor

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

def student(seed=0, bits=3):
    torch.manual_seed(seed)
    model = tiny_vit()
    quantize_model(model, QuantizationConfig(weight_bits=bits, activation_bits=4))
    calibrate_model(model, [torch.randn(8, 3, 16, 16)], disable_progress=True)
    return model.eval()

@torch.no_grad()
def logits(model):
    return model(IMAGES).logits

def raised(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")

def trainer(folder, **options):
    torch.manual_seed(0)
    teacher = tiny_vit()
    model = __import__("copy").deepcopy(teacher)
    quantize_model(model, QuantizationConfig(weight_bits=3, activation_bits=4))
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % CLASSES} for i in range(16)]
    args = SQAKDTrainingArguments(
        output_dir=folder, report_to="none", use_cpu=True, disable_tqdm=True, per_device_train_batch_size=8,
        max_steps=4, save_steps=2, hub_model_id="me/run", hub_token=os.environ["HF_TOKEN"], hub_always_push=True,
        **options,
    )
    return SQAKDTrainer(model, teacher, args, data, data)
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def run(hub, tmp_path):
    """Run code in a fresh process whose Hub is the server."""

    def run(code: str, token: str | None = TOKEN) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("HF_TOKEN", None)
        if token is not None:
            environment["HF_TOKEN"] = token
        command = [sys.executable, "-c", PREPARE + textwrap.dedent(code), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def files(hub, name, revision="main"):
    return hub.repos[name].at(revision).files


def is_packed(content):
    weights = [tensor for name, tensor in load(content).items() if name.endswith(("proj.weight", "classifier.weight"))]
    assert weights
    return all(tensor.dim() == 1 for tensor in weights)


def assert_no_secret(hub):
    for repo in hub.repos.values():
        for commit in repo.commits:
            assert not [path for path in commit.files if path.endswith("training_args.bin")]
            for path, content in commit.files.items():
                assert TOKEN.encode() not in content, path


def test_a_student_goes_up_and_comes_down_whole(hub, run, tmp_path):
    run(
        """
        model = student()
        torch.save(logits(model), sys.argv[1] + "/logits.pt")
        model.push_to_hub("me/student", base_model="timm/resnet18.a1_in1k", tags=["mine"])
        """
    )
    uploaded = files(hub, "me/student")
    expected = {"README.md", "report.html", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert uploaded.keys() == {".gitattributes", *expected} and is_packed(uploaded["model.safetensors"])
    assert_no_secret(hub)
    card = ModelCard(uploaded["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("timm/resnet18.a1_in1k", "quantized")
    assert card.data.library_name == "transformers" and {"sqakd", "w3a4", "mine"} <= set(card.data.tags)
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert "import sqakd_hf" in snippet and "me/student" in snippet
    assert "(report.html)" in card.text and "me/student: W3A4" in uploaded["report.html"].decode()
    run(
        snippet
        + """
import PIL.Image
assert torch.equal(logits(model), torch.load(sys.argv[1] + "/logits.pt"))
assert len(classifier(PIL.Image.new("RGB", (20, 20)))) == CLASSES
assert AutoImageProcessor.from_pretrained("me/student").crop_size["height"] == 16
"""
    )


def test_another_upload_brings_its_own_report(hub, run):
    run(
        """
        student(0).push_to_hub("me/student")
        student(1).push_to_hub("me/student")
        assert "leave out 'report'" in str(raised(lambda: student().push_to_hub("me/student", report="a.html")))
        """
    )
    first, second = [commit for commit in hub.repos["me/student"].commits if "report.html" in commit.files]
    assert first.files["report.html"] != second.files["report.html"]


def test_revisions_are_kept_apart(hub, run):
    run(
        """
        one, two = student(0), student(1)
        one.push_to_hub("me/student")
        two.push_to_hub("me/student", revision="v2")
        load = AutoModelForImageClassification.from_pretrained
        assert torch.equal(logits(load("me/student")), logits(one))
        assert torch.equal(logits(load("me/student", revision="v2")), logits(two))
        assert "v3" in str(raised(lambda: load("me/student", revision="v3")))
        missing = raised(lambda: load("me/nothing"))
        assert isinstance(missing, OSError) and "me/nothing" in str(missing)
        """
    )
    assert hub.repos["me/student"].branches.keys() == {"main", "v2"}


def test_a_private_repository_needs_the_token(hub, run):
    run('student().push_to_hub("me/secret", private=True)')
    assert hub.repos["me/secret"].private
    run('AutoModelForImageClassification.from_pretrained("me/secret", force_download=True)')
    for token in (None, "hf_wrong"):
        run(
            """
            load = lambda: AutoModelForImageClassification.from_pretrained("me/secret", force_download=True)
            assert isinstance(raised(load), OSError)
            """,
            token,
        )


def test_a_refused_upload_is_a_sentence(hub, run):
    run(
        """
        error = raised(lambda: student().push_to_hub("me/student"))
        assert isinstance(error, UploadError) and "me/student" in str(error) and "token" in str(error), error
        """,
        "hf_wrong",
    )
    assert not hub.repos


def test_a_broken_connection_leaves_everything_here_and_the_retry_succeeds(hub, run, tmp_path):
    run('student().push_to_hub("me/student")')
    hub.drop_commits = 100
    run(
        """
        error = raised(lambda: student(1).push_to_hub("me/student"))
        assert isinstance(error, UploadError) and "call push_to_hub again" in str(error), error
        mine = trainer(sys.argv[1] + "/out")
        mine.train()
        error = raised(mine.push_to_hub)
        assert isinstance(error, UploadError) and "/out" in str(error), error
        AutoModelForImageClassification.from_pretrained(sys.argv[1] + "/out")
        """
    )
    assert [commit.message for commit in hub.repos["me/student"].commits] == ["initial commit", "Upload model"]
    hub.drop_commits = 0
    run(
        """
        student(1).push_to_hub("me/student")
        loaded = AutoModelForImageClassification.from_pretrained("me/student")
        assert torch.equal(logits(loaded), logits(student(1)))
        """
    )


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_the_trainer_uploads_packed_students_by_every_strategy(hub, run, tmp_path, strategy):
    run(
        f"""
        mine = trainer(sys.argv[1] + "/out", push_to_hub=True, hub_strategy="{strategy}")
        mine.calibrate()
        mine.evaluate()
        mine.train()
        mine.evaluate()
        mine.push_to_hub()
        torch.save(logits(mine.model.eval()), sys.argv[1] + "/logits.pt")
        import json
        Path(sys.argv[1], "results.json").write_text(json.dumps(mine.results))
        """
    )
    repo = hub.repos["me/run"]
    assert_no_secret(hub)
    progress = [commit for commit in repo.commits if commit.message.startswith("Training in progress")]
    assert bool(progress) is (strategy != "end")
    final = files(hub, "me/run")
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= final.keys()
    assert {"report.html", "training_record.json"} <= final.keys()
    for commit in repo.commits:
        if "model.safetensors" in commit.files:
            assert is_packed(commit.files["model.safetensors"])
    folders = {path.split("/")[0] for path in final if path.endswith("trainer_state.json")}
    stored = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}
    assert folders == stored.get(strategy, set())
    for folder in folders:
        assert not is_packed(final[f"{folder}/model.safetensors"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"teacher", "calibrated", "student"}
    card = ModelCard(final["README.md"].decode())
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {name: results["student"][name] for name in ("accuracy", "agreement", "kl")}
    run(
        """
        loaded = AutoModelForImageClassification.from_pretrained("me/run")
        assert torch.equal(logits(loaded), torch.load(sys.argv[1] + "/logits.pt"))
        from sqakd_hf.reporting.training_record import TrainingRecord
        record = TrainingRecord.load("me/run")
        assert record.results["student"]["images"] == 16 and any("eval_loss" in log for log in record.log_history)
        """
    )
    if strategy == "checkpoint":
        folder = tmp_path / "down" / "checkpoint-4"
        folder.mkdir(parents=True)
        for path, content in final.items():
            if path.startswith("last-checkpoint/"):
                (folder / path.removeprefix("last-checkpoint/")).write_bytes(content)
        run(
            f"""
            mine = trainer(sys.argv[1] + "/again")
            mine.args.max_steps = 6
            mine.train(resume_from_checkpoint={str(folder)!r})
            assert mine.state.global_step == 6
            """
        )


def test_uploads_of_a_trainer_keep_their_order_and_their_contents_on_a_slow_connection(hub, run):
    hub.delays = [1.0, 1.0, 0.5, 0.5]
    run(
        """
        mine = trainer(sys.argv[1] + "/out", push_to_hub=True, hub_strategy="all_checkpoints", learning_rate=1e-2)
        mine.train()
        first = mine.push_to_hub("One", blocking=False)
        with torch.no_grad():
            mine.model.classifier.bias += 1
        mine.push_to_hub("Two")
        assert first.done()
        """
    )
    commits = hub.repos["me/run"].commits[1:]
    assert [commit.message for commit in commits] == [
        "Training in progress, step 2",
        "Training in progress, step 2, checkpoint",
        "Training in progress, step 4",
        "Training in progress, step 4, checkpoint",
        "One",
        "Two",
    ]
    second, _, fourth, _, one, two = (commit.files["model.safetensors"] for commit in commits)
    assert second != fourth == one != two


def test_an_upload_that_fails_while_training_is_a_warning(hub, run):
    hub.drop_commits = 100
    run(
        """
        import logging.handlers
        said = logging.handlers.BufferingHandler(100)
        logging.getLogger("sqakd_hf").addHandler(said)
        mine = trainer(sys.argv[1] + "/out", push_to_hub=True, hub_strategy="every_save")
        mine.train()
        assert mine.state.global_step == 4
        assert sum("did not complete" in record.getMessage() for record in said.buffer) == 2
        """
    )


@pytest.mark.parametrize("name", ["config.json", "README.md", "report.html"])
def test_what_fails_on_this_side_is_not_called_an_upload(hub, run, name):
    run(
        f"""
        mine = trainer(sys.argv[1] + "/out", push_to_hub=True, hub_strategy="end")
        mine.train()
        blocked = Path(sys.argv[1], "out", {name!r})
        blocked.unlink(missing_ok=True)
        blocked.mkdir()
        error = raised(mine.push_to_hub)
        assert isinstance(error, IsADirectoryError) and {name!r} in str(error), error
        """
    )
    assert [commit.message for commit in hub.repos["me/run"].commits] == ["initial commit"]


def test_a_card_that_cannot_be_written_is_not_called_an_upload(hub, run):
    run(
        """
        class Broken:
            def __iter__(self):
                raise RuntimeError("the cause")

        error = raised(lambda: student().push_to_hub("me/student", datasets=Broken()))
        assert type(error) is RuntimeError and str(error) == "the cause", error
        """
    )
