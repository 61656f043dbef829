import re
import subprocess
import sys
from pathlib import Path

from sqakd_hf import is_calibrated
from tests.helpers.paths import ROOT


README = (ROOT / "README.md").read_text()
PAGES = [README, *((ROOT / "docs" / f"{name}.md").read_text() for name in ("training", "sharing", "deploy", "models"))]


def test_the_python_of_the_pages_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", "\n".join(PAGES), re.DOTALL)
    assert len(blocks) == 6
    *blocks, deployed, plan = blocks
    namespace = {}
    for block in (*blocks, plan):
        exec(block, namespace)
    assert is_calibrated(namespace["student"])
    assert Path("student/config.json").exists()
    # Where nothing but numpy and ONNX Runtime is installed.
    others = ("torch", "onnx", "transformers", "timm", "sqakd_hf", "PIL")
    code = f"import sys\nsys.modules.update(dict.fromkeys({others}))\n{deployed}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in namespace["student"].config.id2label.values()
    said = " ".join(line.removeprefix("# ") for line in plan.splitlines() if line.startswith("# "))
    assert said == str(namespace["plan"].coverage())


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 150


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page if link[0] == "" else (page.parent / link[0]).resolve()
            assert target.exists(), (page.name, link)
            if link[1]:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}
                assert link[1] in anchors, (page.name, link)


def test_the_two_commands_are_the_ones_that_ci_and_the_example_know():
    root = ROOT
    commands = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert commands[0].strip() in "pip install -e . && accelerate launch examples/run_sqakd.py --model timm/resnet18"
    (testing,) = (command for command in commands if "pytest" in command)
    install, test = (part.strip() for part in testing.split("&&"))
    ci = (root / ".ci" / "run").read_text()
    assert install.removeprefix("pip install ") in ci and test in ci
