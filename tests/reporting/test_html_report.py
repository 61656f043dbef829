import dataclasses
import re
from html.parser import HTMLParser

import pytest
import torch

from sqakd_hf import QuantizationConfig, calibrate_model, quantize_model, quantized_layers
from sqakd_hf.reporting.html_report import html_report
from sqakd_hf.reporting.training_record import TrainingRecord
from tests.helpers.models import TinyConvNet


VOID = {"meta", "br", "img", "input", "link", "hr"}
RESULTS = {
    "teacher": {"accuracy": 0.98, "agreement": 1.0, "kl": 0.0, "images": 50},
    "calibrated": {"accuracy": 0.3, "agreement": 0.31, "kl": 1.5, "images": 50},
    "student": {"accuracy": 0.97, "agreement": 0.96, "kl": 0.03, "images": 50},
}
LOGS = [
    {"loss": 1.0, "agreement": 0.5, "epoch": 1.0},
    {"eval_loss": 0.9, "eval_agreement": 0.6, "epoch": 1.0},
    {"loss": 0.5, "agreement": 0.8, "epoch": 2.0},
]
LATENCY = {
    "latencies": [
        {"engine": "PyTorch", "what": "float32", "milliseconds": 10.0, "speed_up": 1.0, "spread": 0.0},
        {"engine": "ONNX Runtime", "what": "int8 file", "milliseconds": 2.0, "speed_up": 5.0, "spread": 0.1},
    ],
    "bits": "W2A2",
    "image_size": 32,
    "batch_size": 1,
    "threads": 1,
    "float_bytes": 4000,
    "file_bytes": 1100,
    "versions": {"PyTorch": "2", "ONNX Runtime": "1"},
}


class Page(HTMLParser):
    """What a page holds; its tags must be closed in the order in which they were opened."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.tags, self.loads = [], "", [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [v for name, v in attributes if name in ("src", "href", "xlink:href") and not v.startswith("#")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def student(calibrated=True, **config):
    torch.manual_seed(0)
    model = TinyConvNet()
    quantize_model(model, QuantizationConfig(**config))
    if calibrated:
        calibrate_model(model, [torch.randn(8, 3, 32, 32)], disable_progress=True)
    return model.eval()


def deploy_of(model):
    """As of a DeployReport: the first layer in float in every engine but one, the others with integers."""
    kernels = [
        {"layer": name, "operator": "Conv", "onnxruntime": None, "openvino": None, "tensorrt": "it wants <int8>"}
        for name in quantized_layers(model)
    ]
    kernels[0]["onnxruntime"] = "its input is in float"
    return {"kernels": kernels, "coverage": {}, "file_bytes": 1234, "container": "int8"}


class TestHTMLReport:
    def test_shows_what_is_known(self):
        model = student()
        names = list(quantized_layers(model))
        sqnr = {"calibrated": {names[0]: 31.4}, "student": {names[0]: 27.2, names[1]: -1.5}}
        page = Page(html_report(model, "me/net", TrainingRecord(RESULTS, LOGS, sqnr), deploy_of(model), LATENCY))
        for expected in (
            "me/net: W2A2 by lsq",
            *("98.00%", "30.00%", "97.00%", "96.00%", "1.5000", "50"),
            *("31.4 dB", "27.2 dB", "-1.5 dB"),
            *names,
            *("float (1)", "(1) its input is in float", "(2) it wants <int8>", "integer"),
            "5.00 ± 0.10",
            "1,234 bytes",
        ):
            assert expected in page.text, expected
        # Two figures, and one drawing for each layer.
        assert page.tags.count("figure") == 2 and page.tags.count("svg") == 2 + len(names)

    def test_needs_nothing_from_elsewhere(self):
        model = student()
        text = html_report(model, "net", TrainingRecord(RESULTS, LOGS), deploy_of(model), LATENCY)
        page = Page(text)
        assert page.loads == [] and not {"script", "link", "img", "iframe"} & set(page.tags)
        # Only names of namespaces and of vocabularies look like addresses.
        addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
        assert all(
            re.match(r"http://(www\.w3\.org|purl\.org|creativecommons\.org)/", each)
            for each in addresses - {"https://matplotlib.org/"}
        ), addresses

    def test_is_the_same_twice(self):
        model, record = student(), TrainingRecord(RESULTS, LOGS)
        assert html_report(model, "net", record, None, LATENCY) == html_report(model, "net", record, None, LATENCY)

    def test_names_are_text_and_not_markup(self):
        page = Page(html_report(student(), "<script>alert(1)</script>&"))
        assert "script" not in page.tags and "<script>alert(1)</script>&: W2A2" in page.text

    def test_says_what_is_not_known(self):
        page = Page(html_report(student(calibrated=False), "net"))
        for expected in (
            "Not measured",
            "No training is known",
            "has no ranges yet",
            "was not measured by a training",
        ):
            assert expected in page.text
        assert "figure" not in page.tags and "ntropy" not in page.text

    def test_lines_that_share_a_layers_name_do_not_repeat_its_numbers(self):
        model = student()
        plan = model.quantization_plan
        name = plan.layers[1].name
        residual = dataclasses.replace(plan.layers[1], num_weights=0, weight_bits=None)
        model.quantization_plan = dataclasses.replace(plan, residuals=(residual,))
        page = html_report(model, "net", TrainingRecord(layer_sqnr={"student": {name: 12.3}}), deploy_of(model))
        assert page.count(f"<td>{name}</td>") == 2 and page.count("12.3 dB") == 1

    def test_a_calibrated_student_that_was_measured(self):
        results = {key: RESULTS[key] for key in ("teacher", "calibrated")}
        page = Page(html_report(student(), "net", TrainingRecord(results)))
        assert "30.00%" in page.text and "figure" in page.tags and "is known here" in page.text

    def test_ids_are_given_once(self):
        text = html_report(student(), "net", TrainingRecord(RESULTS, LOGS), None, LATENCY)
        ids = [each for each in re.findall(r'id="(m[0-9a-f]+|p[0-9a-f]+)"', text)]
        assert ids and len(ids) == len(set(ids))

    def test_without_labels_the_agreement_stands_for_the_accuracy(self):
        results = {key: {**row, "accuracy": None} for key, row in RESULTS.items()}
        page = Page(html_report(student(), "net", TrainingRecord(results), None, LATENCY))
        assert "agreement with the teacher, %" in page.text and "accuracy, %" not in page.text
        assert "accuracy, %" in Page(html_report(student(), "net", TrainingRecord(RESULTS))).text

    @pytest.mark.parametrize("bits", [1, 2, 8])
    def test_draws_each_code_that_is_used(self, bits):
        model = student(weight_bits=bits, first_last_bits=bits)
        text = html_report(model, "net")
        drawings = re.findall(r'class="codes".*?d="(.*?)"', text)
        for drawing, layer in zip(drawings, quantized_layers(model).values(), strict=True):
            codes, counts = layer.weight_codes().unique(return_counts=True)
            bars = re.findall(r"M([\d.]+) 22v-([\d.]+)h", drawing)
            assert len(bars) == len(codes)
            places = [float(x) for x, _ in bars]
            assert places == pytest.approx((codes.double() * 160 / 2**bits).tolist(), abs=0.06)
            heights = [float(h) for _, h in bars]
            assert heights == pytest.approx((22 * counts / counts.max()).tolist(), abs=0.06)

    def test_counts_codes_and_their_entropy(self):
        model = student(weight_bits=2, first_last_bits=2)
        (name, layer), *_ = quantized_layers(model).items()
        layer.weight_codes = lambda: torch.tensor([[0, 0, 1, 3]], dtype=torch.uint8)  # shares 1/2, 1/4, 1/4
        row = re.search(rf"<tr><td>{re.escape(name)}</td>.*?</tr>", html_report(model, "net"))[0]
        assert ">3 of 4<" in row and ">1.50<" in row
