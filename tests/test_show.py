"""What notebooks show: the very source, tables that hold, text in its place, pictures that are pictures; and nothing heavy at import."""

import io
import subprocess
import sys
from inspect import getsource
from pathlib import Path

import pytest
from PIL import Image

from refimpl.lab.explain import show
from refimpl.lab.explain.show import COLOURS, figure, lines_figure, picture, source, table, text_cells, text_figure, visible
from refimpl.reference import ops
from refimpl.reference.ops import gelu, softmax


def test_source_is_what_stands_in_the_file():
    shown = source(softmax, gelu).data
    link, _, _, code = shown.split("\n")[:4]
    line = next(i for i, text in enumerate(getsource(ops).splitlines(), 1) if text.startswith("def softmax"))
    assert link == f"[`refimpl/reference/ops.py`](../refimpl/reference/ops.py#L{line})" and code.startswith("def softmax(x: np.ndarray)")
    assert shown.count("```python") == 2 and 'np.float32(0.044715) * x * x * x)' in shown and shown.endswith("```")


def test_source_of_a_method_is_not_indented_and_of_a_kernel_is_python():
    from refimpl.kernels.moe import route
    from refimpl.model.blocks import LayerCache
    assert "\n```python\ndef read(self" in source(LayerCache.read).data
    assert "def route(" in source(route).data


def test_source_by_name_is_the_same_and_imports_nothing():
    name = "refimpl.lab.explain.cache_memory"
    from refimpl.lab.explain import cache_memory
    function = next(value for value in vars(cache_memory).values() if getattr(value, "__module__", "") == name)
    assert source(f"{name}.{function.__name__}").data == source(function).data
    with pytest.raises(ValueError, match="^refimpl.model.cache has no nothing$"):
        source("refimpl.model.cache.nothing")
    code = "import sys; from refimpl.lab.explain.show import source; print(source('refimpl.tiny.training.grids.on_grid').data[-9:]); "
    code += "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.endswith("\n```\nFalse\n")


def test_a_table_keeps_its_columns():
    assert table(["a", "b"], [["x|y", 1]]).data == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


def test_text_breaks_at_newlines_and_at_the_edge():
    runs, n_lines = text_cells(["ab", "c\n", "\n", "defgh"], 4)
    assert runs == [(0, 0, 0, "ab"), (1, 0, 2, "c"), (1, 0, 3, "\u21b5"), (2, 1, 0, "\u21b5"), (3, 2, 0, "defg"), (3, 3, 0, "h")]
    assert n_lines == 4


def test_visible():
    assert visible("a b\n\t") == "a\u00b7b\u21b5\u2192"


@pytest.mark.parametrize("make", [
    lambda: text_figure(["def ", "f$x_1$", "\n"], [COLOURS[0]] * 3, ["white"] * 3, key=(("red", "why"),)),
    lambda: lines_figure([[("a", "red", "black")], [("bcd", "white", "black"), ("e", "blue", "white")]]),
    lambda: figure(3, 2)[0]])
def test_a_picture_is_a_small_png_of_its_size(make):
    shown = picture(make(), "what it shows")
    image = Image.open(io.BytesIO(shown.data))
    assert image.format == "PNG" and image.mode == "P" and image.width >= 200 and len(shown.data) < 20_000


def test_the_same_figure_gives_the_same_bytes():
    first, second = (picture(text_figure(["a", "b\n"], ["red", "blue"], ["white"] * 2), "x").data for _ in range(2))
    assert first == second


def test_the_helpers_import_neither_matplotlib_nor_ipython():
    code = "import sys\n" + "".join(f"import refimpl.lab.explain.{path.stem}\n" for path in Path(show.__file__).parent.glob("[a-z]*.py"))
    code += "print([m for m in ('matplotlib', 'IPython', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
