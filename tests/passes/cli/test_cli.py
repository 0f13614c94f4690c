"""The command line as its users meet it: what it prints, what it writes, and how it says no."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from ir_tools.rewrite.numeric_effects import in_words
from passes.cli.main import app
from passes.cli.terminal import check_writable, progress_line
from passes.driver import catalogue
from passes.errors import ModelFileError, SlowerWarning
from tests.timers import SpeedComparisons

REPOSITORY = Path(__file__).parents[3]
INPUT = ("--input", "1x3x16x16")
OPTIMIZE = ("optimize", "cli_zoo:Net", *INPUT)

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    '''conv -> batch norm -> dropout -> relu, with random batch-norm statistics.'''
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        with torch.no_grad():
            self.bn.running_mean.normal_()
            self.bn.running_var.uniform_(0.5, 2)
    def forward(self, x):
        return torch.relu(self.drop(self.bn(self.conv(x))))

class Unbatched(nn.Module):
    '''The batch norm normalises axis 1 of a conv result without batch axis: that is its height.'''
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.mean = nn.Buffer(torch.randn(4))
        self.var = nn.Buffer(torch.rand(4) + 0.5)
    def forward(self, x):
        return nn.functional.batch_norm(self.conv(x), self.mean, self.var)

class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("this model is broken")

def inner_training():
    net = nn.Sequential(nn.Dropout()).eval()
    net[0].train()
    return net

def not_a_bug_of_ours():
    raise ZeroDivisionError("in the user's own factory")
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty working directory with the module `cli_zoo` in it, and a wide terminal so that no line wraps."""
    (tmp_path / "cli_zoo.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    yield tmp_path
    sys.modules.pop("cli_zoo", None)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def succeeds(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def row(text: str, name: str) -> list[str]:
    """The table row or fact that begins with `name`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return line.split()


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.name not in ("__pycache__", "cli_zoo.py")}


# -- optimize ---------------------------------------------------------------------------------------------------------


def test_optimize_reports_and_writes_everything(workplace):
    out = succeeds(
        "optimize", "cli_zoo:Net", *INPUT, "--passes", "fuse_conv_bn_relu, cast_half:dtype=bfloat16",
        "--out", "deep/net.pt", "--dump-dir", "graphs",
    )  # fmt: skip
    assert "front end  export" in out
    assert "cli_zoo:Net was in training mode; .eval() was called" in out
    assert row(out, "fuse_conv_bn")[1:4] == ["1", "0", "3→2"]
    assert row(out, "fuse_conv_relu")[1] == "1"
    assert "dtype=bfloat16" in out
    assert "verified: SQNR" in out
    assert "eager → optimised:" in out and "interleaved rounds" in out
    assert row(out, "saved") == ["saved", "deep/net.pt"]
    assert row(out, "graphs")[1] == "graphs:"
    assert files(workplace / "deep") == {"net.pt"}
    dumped = files(workplace / "graphs")
    assert {"00-captured.dot", "03-fuse_conv_bn.dot", "06-cast_half.dot"} <= dumped


def test_the_saved_file_gives_the_models_numbers(workplace):
    succeeds(*OPTIMIZE, "--out", "net.pt", "--no-bench")
    from passes import load
    from passes.cli.example_inputs import example_inputs
    from passes.cli.sources import load_source

    (x,) = example_inputs(["1x3x16x16"])
    model = load_source("cli_zoo:Net")
    torch.testing.assert_close(load("net.pt")(x), model(x), rtol=1e-5, atol=1e-5)


def test_no_bench_and_no_outputs_print_neither(workplace):
    out = succeeds(*OPTIMIZE, "--no-bench")
    for word in ("latency", "saved", "graphs"):
        assert word not in out
    assert files(workplace) == set()


def test_engine_and_front_end_are_taken(workplace):
    out = succeeds(*OPTIMIZE, "--no-bench", "--engine", "aten", "--frontend", "trace")
    assert row(out, "engine") == ["engine", "aten"]
    assert "trace (asked for)" in out
    assert row(out, "lower_aten")[0] == "lower_aten"


def test_verify_off_says_not_verified(workplace):
    out = succeeds(*OPTIMIZE, "--no-bench", "--verify", "off")
    assert "not verified" in out


def test_a_torchscript_file_is_optimised(workplace):
    succeeds(*OPTIMIZE, "--out", "net.pt", "--no-bench", "--engine", "aten", "--passes", "")
    out = succeeds("optimize", "net.pt", *INPUT, "--passes", "fuse_conv_bn_relu")
    assert "script (the model is TorchScript)" in out
    assert row(out, "fuse_conv_bn")[1] == "1"
    assert "eager → optimised:" in out


def test_a_file_of_ours_brings_its_own_inputs(workplace):
    succeeds(*OPTIMIZE, "--out", "net.pt", "--no-bench", "--engine", "aten", "--passes", "")
    assert "float32[1, 3, 16, 16]" in succeeds("explain", "net.pt")


def test_calibration_calls_come_from_a_file(workplace):
    x = torch.ones(1, 3, 16, 16)
    torch.save([x, (x * 0,), [x * 2], {"x": x}], "calls.pt")
    arguments = ("cli_zoo:Net", *INPUT, "--passes", "cast_half:on_slower=keep", "--calibration", "calls.pt")
    out = succeeds("optimize", *arguments, "--no-bench")
    assert "cast_half: ranges observed on 4 calls of calibration_data" in out
    assert re.search(r"bfloat16(: | is SLOWER than float32 on this machine: )[\d.]+ → [\d.]+ ms, [\d.]+x as fast", out)
    assert "cast_half: ranges observed on 4 calls of calibration_data" in succeeds("explain", *arguments)
    assert "ranges observed on 1 call of the example inputs" in succeeds("explain", *arguments[:-2])


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "the calibration file calls.pt cannot be read: No such file or directory"),
        (b"", "the calibration file calls.pt holds something else than tensors, or is damaged; expected what torch.save"),
        (b"1x3x16x16", "holds something else than tensors, or is damaged"),
        (torch.ones(1, 3, 16, 16), "the calibration file calls.pt holds a Tensor; expected what torch.save writes of a list"),
        ({"x": torch.ones(1)}, "the calibration file calls.pt holds a dict; expected"),
        ([Path("x")], "holds something else than tensors, or is damaged"),
        ([torch.nn.Linear(1, 1)], "holds something else than tensors, or is damaged"),
        ([], "calibration_data is empty"),
        ([torch.ones(1, 3, 16, 16), "x"], "calibration_data[1] must be a tensor, a tuple or list of arguments, or a dict of"),
        ([torch.ones(1, 3, 8, 8)], "calibration_data[0] does not fit the example inputs: input 'x' must have shape"),
    ],
    ids=["missing", "empty file", "text", "a tensor", "a dict", "objects", "a module", "empty", "texts", "shape"],
)
@pytest.mark.parametrize("command", ["optimize", "explain"])
def test_calibration_files_that_are_not(workplace, command, content, message):
    if isinstance(content, bytes):
        Path("calls.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, "calls.pt")
    result = run(command, "cli_zoo:Net", *INPUT, "--passes", "cast_half", "--calibration", "calls.pt")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and message in result.stderr


def test_a_directory_is_no_calibration_file(workplace):
    assert "the calibration file . cannot be read: Is a directory" in run(*OPTIMIZE, "--calibration", ".").stderr


def test_the_command_line_prints_the_speed_comparison_once(workplace, monkeypatch, use_timer):
    """In the report, and not as a Python warning besides."""
    from passes.cli import main as cli

    use_timer(SpeedComparisons({"without": [0.001], "with": [0.002]}))
    out = succeeds(*OPTIMIZE, "--no-bench", "--passes", "cast_half")
    assert out.count("bfloat16 is SLOWER than float32 on this machine: 1 → 2 ms, 0.50x as fast") == 1
    out = succeeds(*OPTIMIZE, "--no-bench", "--passes", "cast_half:on_slower=revert")
    assert "returning the float32 model (on_slower='revert')" in out and "reverted" in out
    monkeypatch.setattr(cli, "app", lambda prog_name: warnings.warn("slower", SlowerWarning, stacklevel=1))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        cli.main()
    assert not heard


# -- explain, dry run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("explain",), ("optimize", "--dry-run", "--out", "net.pt")])
def test_explain_says_what_would_fire_and_writes_nothing(workplace, arguments):
    command, *options = arguments
    out = succeeds(command, "cli_zoo:Net", *INPUT, *options)
    assert "fuse_conv_bn: batch_norm(layer(x)) -> layer(x) ×1" in out
    assert "remove_dropout: " in out
    assert "found nothing to do\n  fold_constants" in out
    assert "dry run: nothing was emitted" in out
    assert files(workplace) == set()


def test_explain_says_why_a_pass_would_not_fire(workplace):
    out = succeeds("explain", "cli_zoo:Unbatched", "--input", "4x4x4")
    assert "refused" in out
    assert "The layer's channels are the axis that the batch norm normalises" in out
    assert "fuse_conv_bn: batch_norm(layer(x)) -> layer(x)" not in out


# -- passes -----------------------------------------------------------------------------------------------------------


def test_passes_lists_every_pass_and_group():
    out = succeeds("passes")
    for name, entry in catalogue.CATALOGUE.items():
        assert f"{name}  {in_words(entry.effects)}\n" in out
        assert entry.summary in out
        assert entry.equation.splitlines()[0] in out
    for name, members in catalogue.GROUPS.items():
        assert f"{name} = {', '.join(members)}" in out


def test_options_are_listed_as_they_are_typed_with_what_they_may_be():
    out = succeeds("passes")
    for line in (
        "dtype=bfloat16|float16", "level=O2|O1|O3", "keep_float=NAME+NAME", "overrides=NAME=O1|O2|O3|float+NAME=...",
        "on_slower=warn|keep|revert", "variant=measured|fused", "records=TEXT",
    ):  # fmt: skip
        assert f"  :{line}\n" in out
    assert "keep_float=()" not in out and "{}" not in out and "the first is the default" in " ".join(out.split())
    help_text = " ".join(succeeds("optimize", "--help").split())
    assert "keep_float=head+softmax" in help_text


@pytest.mark.parametrize(
    "passes, message",
    [
        ("cast_half:keep_float=a,b", "there is no pass 'b'; commas part passes, and names in an option are joined by '+': "
                                     "keep_float=a+b"),
        ("cast_half:overrides=0=O1,1=float", "joined by '+': overrides=0=O1+1=float"),
        ("cast_half:keep_float=a,b,fuse_conv_bn", "keep_float=a+b"),
        ("cast_half:level=O1,fuse_conf_bn", "there is no pass 'fuse_conf_bn'; did you mean fuse_"),
    ],
)  # fmt: skip
def test_names_in_an_option_are_not_joined_by_commas(workplace, passes, message):
    result = run("explain", "cli_zoo:Net", *INPUT, "-p", passes)
    assert result.exit_code == 2 and message in result.stderr


def test_equations_are_not_cut_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    out = succeeds("passes").replace("\n", "")
    for entry in catalogue.CATALOGUE.values():
        assert entry.equation.splitlines()[0] in out


# -- draw -------------------------------------------------------------------------------------------------------------


def test_draw_dot(workplace):
    out = succeeds("draw", "cli_zoo:Net", *INPUT, "--out", "net.dot")
    assert row(out, "drawn") == ["drawn", "net.dot"]
    text = (workplace / "net.dot").read_text()
    assert "batch_norm" in text and 'label="cli_zoo:Net: 4 ops"' in text


def test_draw_with_passes(workplace):
    passes = ("--passes", "fuse_conv_bn_relu,lower_onednn:variant=fused")
    succeeds("draw", "cli_zoo:Net", *INPUT, "--out", "net.dot", *passes)
    text = (workplace / "net.dot").read_text()
    assert "_convolution_pointwise (relu)" in text and "batch_norm" not in text.replace("fuse_conv_bn", "")


def test_draw_a_file(workplace):
    succeeds(*OPTIMIZE, "--passes", "fuse_conv_bn_relu,lower_onednn:variant=fused", "--out", "net.pt", "--no-bench")
    succeeds("draw", "net.pt", "--out", "net.dot")
    assert "_convolution_pointwise" in (workplace / "net.dot").read_text()


def test_draw_svg_falls_back_to_dot_and_says_why(workplace, monkeypatch):
    monkeypatch.setenv("PATH", str(workplace))
    out = succeeds("draw", "cli_zoo:Net", *INPUT, "--out", "net.svg")
    assert "graphviz program `dot` not found: DOT files are written, no SVG" in out
    assert row(out, "drawn") == ["drawn", "net.dot"]
    assert files(workplace) == {"net.dot"}


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_reads_what_optimize_wrote(workplace):
    succeeds(*OPTIMIZE, "--out", "net.pt", "--no-bench", "--passes", "fuse_conv_bn_relu")
    out = succeeds("verify", "net.pt")
    assert torch.__version__ in out
    assert "fold_constants, remove_dropout, fuse_conv_bn, fold_affine, fuse_conv_relu" in out
    assert "x: float32[1, 3, 16, 16]" in out
    assert "against the eager model when it was written" in out
    assert "verified: the file gives its golden outputs" in out


def test_verify_says_when_the_numbers_were_never_compared(workplace):
    succeeds(*OPTIMIZE, "--out", "net.pt", "--no-bench", "--verify", "off")
    assert "not verified when it was written" in succeeds("verify", "net.pt")


def test_verify_fails_when_the_outputs_are_others(workplace):
    from ir_tools.emit import package

    succeeds(*OPTIMIZE, "--out", "net.pt", "--no-bench")
    scripted, manifest, inputs, outputs = package.load("net.pt")
    package.save(scripted, "net.pt", manifest, inputs, [outputs[0] * 1.5])
    result = run("verify", "net.pt")
    assert result.exit_code == 2
    assert "error: net.pt does not give its golden outputs on this machine" in result.stderr


# -- saying no --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("optimize", "cli_zoo:Net"), "no --input was given"),
        (("optimize", "cli_zoo:Net", "-i", "1,3"), "'1,3' is not an input; expected a shape such as 1x3x224x224"),
        (("optimize", "cli_zoo:Net", "-i", "1x3:f32"), "'f32' in '1x3:f32' is not a dtype"),
        (("optimize", "cli_zoo:Net", "-i", "1x4x8x8"), "expected input[1, 4, 8, 8] to have 3 channels"),
        (("optimize", "cli_zoo:Net", *INPUT, *INPUT), "too many positional arguments"),
        (("optimize", "cli_zoo:Nett", *INPUT), "cli_zoo has no 'Nett'; did you mean Net?"),
        (("optimize", "resnet50", *INPUT), "'resnet50' is not a model; expected a TorchScript file (.pt), package"),
        (("optimize", "cli_zoo:Raises", *INPUT), "this model is broken"),
        (("optimize", "cli_zoo:inner_training", *INPUT), "the model is in training mode (0); call model.eval()"),
        (("optimize", "missing.pt", *INPUT), "there is no file 'missing.pt'"),
        ((*OPTIMIZE, "-p", "fuse_conf_bn"), "there is no pass 'fuse_conf_bn'; did you mean fuse_"),
        ((*OPTIMIZE, "-p", "cast_half,fuse_conv_bn"), "fuse_conv_bn must come before cast_half"),
        ((*OPTIMIZE, "-p", "cast_half:typ=1"), "the pass cast_half has no option 'typ'"),
        ((*OPTIMIZE, "-p", "cast_half:dtype=int3"), "dtype must be one of 'bfloat16', 'float16'"),
        ((*OPTIMIZE, "--engine", "x"), "engine must be one of 'auto', 'aten', 'onednn_ops'"),
        ((*OPTIMIZE, "--frontend", "x"), "frontend must be one of 'auto', 'export'"),
        ((*OPTIMIZE, "--verify", "x"), "verify must be one of 'each', 'ends', 'off'"),
        ((*OPTIMIZE, "--tolerance", "500"), "the pass fuse_conv_bn changed the numbers too much"),
        ((*OPTIMIZE, "--out", "."), ". is a directory; expected the name of a file"),
        ((*OPTIMIZE, "--out", "cli_zoo.py/x.pt"), "cli_zoo.py is not a directory"),
        ((*OPTIMIZE, "--dump-dir", "cli_zoo.py"), "dump_dir 'cli_zoo.py' cannot be written"),
        (("explain", "cli_zoo:Net"), "no --input was given"),
        (("explain", "cli_zoo:Net", *INPUT, "-p", "nonsense"), "there is no pass 'nonsense'"),
        (("draw", "cli_zoo:Net", *INPUT, "--out", "net.png"), "--out must end in .svg or .dot, got 'net.png'"),
        (("draw", "cli_zoo:Net", "--out", "net.dot"), "no --input was given"),
        (("verify", "missing.pt"), "there is no file missing.pt"),
        (("verify", "cli_zoo.py"), "cli_zoo.py is not a TorchScript file"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(workplace, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    assert files(workplace) == set()


@pytest.mark.parametrize("command", ["optimize", "verify"])
@pytest.mark.parametrize(
    "content, message",
    [
        ("truncated", "is cut short or damaged"),
        ("pickle", "was pickled by torch.save, and is not TorchScript; it is not opened"),
        ("empty", "is empty"),
    ],
)
def test_unreadable_model_files(workplace, command, content, message):
    path = workplace / "model.pt"
    torch.save({"weight": torch.zeros(3)}, path)
    if content != "pickle":
        path.write_bytes(path.read_bytes()[: 100 if content == "truncated" else 0])
    result = run(command, "model.pt", *(INPUT if command == "optimize" else ()))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: model.pt {message}")


def test_a_model_that_no_front_end_captures_lists_every_reason(workplace):
    (workplace / "cli_zoo.py").write_text(
        "import torch\n"
        "class Shy(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        if torch.jit.is_tracing() or type(x) is not torch.Tensor:\n"
        "            raise RuntimeError('not while you are looking')\n"
        "        return x * 2\n"
    )
    result = run("optimize", "cli_zoo:Shy", "--input", "3", "--out", "shy.pt")
    assert result.exit_code == 2
    assert "error: no front end can capture this model:" in result.stderr
    for frontend in ("export", "trace", "script", "fx"):
        assert f"\n  {frontend}: " in result.stderr
    assert "not while you are looking" in result.stderr
    assert files(workplace) == set()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("optimize",), "Missing argument"),
        (("frobnicate",), "No such command 'frobnicate'"),
        (("optimize", "cli_zoo:Net", "--tolerance", "much"), "Invalid value for '--tolerance'"),
        (("draw", "cli_zoo:Net"), "Missing option '--out'"),
    ],
)
def test_wrong_usage(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_errors_that_are_not_ours_keep_their_traceback(workplace):
    result = run("optimize", "cli_zoo:not_a_bug_of_ours", *INPUT)
    assert isinstance(result.exception, ZeroDivisionError)
    assert "error: " not in result.stderr


def test_square_brackets_in_messages_are_printed_as_they_are(workplace):
    result = run("optimize", "[bold]:x", *INPUT)
    assert "error: '[bold]:x' is not a model" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ModelFileError, match="no permission"):
        check_writable(tmp_path / "model.pt")


# -- around -----------------------------------------------------------------------------------------------------------


def test_help_documents_sources_and_inputs():
    result = run("optimize", "--help")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for part in ("torchvision:NAME", "timm:NAME", "package.module:callable", "1x3x224x224", "1x128:int64:30522"):
        assert part in text
    commands = run("--help").stdout
    for command in ("optimize", "explain", "passes", "draw", "verify"):
        assert f"  {command} " in commands


def test_python_m_passes_runs_in_the_working_directory(workplace):
    done = subprocess.run(
        [sys.executable, "-m", "passes", "explain", "cli_zoo:Net", *INPUT],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr
    assert "fuse_conv_bn: batch_norm(layer(x)) -> layer(x) ×1" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout and "DeprecationWarning" not in done.stderr


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    with progress_line() as progress:
        progress("capturing")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    with progress_line() as progress:
        progress("capturing")
    assert "capturing" in capsys.readouterr().err
    with progress_line(still=True) as progress:
        progress("timing")
    assert capsys.readouterr().err.count("timing") == 1
