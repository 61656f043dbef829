import PIL.Image
import pytest
from matplotlib.figure import Figure

from sqakd_hf import LayerPlan, QuantizationPlan
from sqakd_hf.reporting.tables import plot_learning_curve, plot_trade_off, results_table


PLAN = QuantizationPlan(
    (
        LayerPlan("stem", "Conv2d", 100, "lsq", 8, 8),
        LayerPlan("body", "Conv2d", 50_000, "lsq", 2, 4),
        LayerPlan("head", "Linear", 1_000, skipped="first or last layer"),
    )
)
# Bytes: float 51,100 * 4; student 100 at 8 bits, 50,000 at 2 bits, 1,000 in float.
FLOAT_BYTES, STUDENT_BYTES = "204,400", "16,600"

RESULTS = {
    "teacher": {"accuracy": 0.98765, "agreement": 1.0, "kl": 0.0},
    "calibrated": {"accuracy": 0.1, "agreement": 0.125, "kl": 12.34567},
    "student": {"accuracy": 0.9, "agreement": 0.95555, "kl": 0.00005},
}


def history(train=True, evaluation=True):
    """A Trainer's log: training logs, evaluations, and the summary at the end."""
    logs = []
    for step in range(1, 5):
        if train:
            logs.append({"loss": 4.0 / step, "agreement": step / 5, "learning_rate": 1e-3, "epoch": step / 2})
        if evaluation and step % 2 == 0:
            logs.append({"eval_loss": 3.0 / step, "eval_agreement": step / 6, "eval_runtime": 1.0, "epoch": step / 2})
    return [*logs, {"train_loss": 2.0, "train_runtime": 1.0, "epoch": 2.0}]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], Figure.savefig

    def spy(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


class TestResultsTable:
    def test_shows_the_three_networks_side_by_side(self):
        assert results_table(RESULTS, PLAN).splitlines() == [
            "                   accuracy  agreement       KL   bits  weight bytes",
            "--------------------------------------------------------------------",
            "teacher              98.77%    100.00%   0.0000  float       204,400",
            "calibrated only      10.00%     12.50%  12.3457   W2A4        16,600",
            "distilled student    90.00%     95.56%   0.0001   W2A4        16,600",
        ]

    def test_all_lines_are_equally_long(self):
        assert len({len(line) for line in results_table(RESULTS, PLAN).splitlines()}) == 1

    def test_what_was_not_measured_is_a_dash(self):
        nothing = {"accuracy": None, "agreement": None, "kl": None}
        table = results_table({"teacher": nothing, "calibrated": nothing, "student": RESULTS["student"]}, PLAN)
        assert [line.split() for line in table.splitlines()[2:]] == [
            ["teacher", "-", "-", "-", "float", FLOAT_BYTES],
            ["calibrated", "only", "-", "-", "-", "W2A4", STUDENT_BYTES],
            ["distilled", "student", "90.00%", "95.56%", "0.0001", "W2A4", STUDENT_BYTES],
        ]
        assert len({len(line) for line in table.splitlines()}) == 1

    def test_zero_was_measured(self):
        zero = {"accuracy": 0.0, "agreement": 0.0, "kl": 0.0}
        table = results_table({"teacher": zero, "calibrated": zero, "student": zero}, PLAN)
        assert table.splitlines()[2].split() == ["teacher", "0.00%", "0.00%", "0.0000", "float", FLOAT_BYTES]

    def test_cells_stand_under_their_titles(self):
        head, _, *rows = results_table(RESULTS, PLAN).splitlines()
        for row in rows:
            for title, cell in zip(
                ("accuracy", "agreement", "KL", "bits", "weight bytes"), row[18:].split(), strict=True
            ):
                end = head.index(title) + len(title)
                assert row[:end].endswith(cell)


class TestPlotLearningCurve:
    @pytest.mark.parametrize("evaluation", [True, False], ids=["with evaluation", "without evaluation"])
    def test_writes_a_picture(self, tmp_path, evaluation):
        path = tmp_path / "curve.png"
        plot_learning_curve(history(evaluation=evaluation), path, title="resnet18 at W2A2")
        with PIL.Image.open(path) as picture:
            # 9 x 3.6 inches at 120 dots.
            assert picture.format == "PNG" and picture.size == (1080, 432)
            # Not a blank page: the line's blue is on it.
            colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
            assert (31, 119, 180) in colors and (255, 255, 255) in colors
        assert 5_000 < path.stat().st_size < 500_000

    def test_draws_training_and_evaluation_by_epoch(self, tmp_path, drawn):
        plot_learning_curve(history(), str(tmp_path / "curve.png"), title="title")
        (figure,) = drawn
        assert figure.get_suptitle() == "title"
        loss, agreement = figure.axes
        assert "KL" in loss.get_title() and "agreement" in agreement.get_title()
        curves = [
            [(line.get_label(), line.get_xydata().tolist()) for line in axes.lines] for axes in (loss, agreement)
        ]
        epochs = [0.5, 1.0, 1.5, 2.0]
        assert curves == [
            [
                ("training images", [[e, 2.0 / e] for e in epochs]),
                ("held-out images", [[1.0, 1.5], [2.0, 0.75]]),
            ],
            [
                ("training images", [[e, 2 * e / 5] for e in epochs]),
                ("held-out images", [[1.0, 2 / 6], [2.0, 4 / 6]]),
            ],
        ]
        assert loss.get_ylim()[0] == 0 and loss.get_xlabel() == agreement.get_xlabel() == "epoch"
        assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training images", "held-out images"]

    @pytest.mark.parametrize(
        ("train", "evaluation", "expected"),
        [(True, False, ["training images"]), (False, True, ["held-out images"]), (False, False, [])],
        ids=["no evaluation", "no training", "neither"],
    )
    def test_leaves_out_what_was_not_logged(self, tmp_path, drawn, train, evaluation, expected):
        plot_learning_curve(history(train, evaluation), tmp_path / "curve.png")
        for axes in drawn[0].axes:
            assert [line.get_label() for line in axes.lines] == expected
            assert (axes.get_legend() is not None) == bool(expected)
        assert PIL.Image.open(tmp_path / "curve.png").size == (1080, 432)

    def test_of_an_empty_log_is_an_empty_picture(self, tmp_path):
        plot_learning_curve([], tmp_path / "curve.png")
        assert PIL.Image.open(tmp_path / "curve.png").size == (1080, 432)

    def test_leaves_no_figure_open(self, tmp_path):
        from matplotlib import pyplot

        before = pyplot.get_fignums()
        plot_learning_curve(history(), tmp_path / "curve.png")
        assert pyplot.get_fignums() == before


class TestPlotTradeOff:
    SIZES = (("teacher", 2e6, 0.9), ("student", 1e5, 0.8))
    TIMES = (("PyTorch", 10.0, 0.9), ("ONNX Runtime", 2.0, 0.8))

    def test_draws_each_point_where_it_is(self, tmp_path, drawn):
        plot_trade_off(self.SIZES, self.TIMES, "accuracy", tmp_path / "a.png", "title")
        (figure,) = drawn
        found = [[(line.get_label(), *line.get_xydata()[0].tolist()) for line in axes.lines] for axes in figure.axes]
        assert found == [
            [("teacher", 2.0, 90.0), ("student", 0.1, 80.0)],
            [("PyTorch", 10.0, 90.0), ("ONNX Runtime", 2.0, 80.0)],
        ]
        assert [axes.get_xlabel() for axes in figure.axes] == ["MB of weights", "ms for a batch"]
        assert {axes.get_ylabel() for axes in figure.axes} == {"accuracy, %"}

    def test_without_times_it_says_so(self, tmp_path, drawn):
        plot_trade_off(self.SIZES, (), "agreement", tmp_path / "a.svg", format="svg")
        assert [text.get_text() for text in drawn[0].axes[1].texts] == ["not measured"]
        picture = (tmp_path / "a.svg").read_text()
        assert "not measured" in picture and "teacher" in picture  # text stays text
