"""`benchmarks/contexts.py`: what it draws of the figures of two models."""

import json

import contexts
import pytest


def ranges(*losses):
    return [{"from": 1, "to": 2**number, "loss": loss, "targets": 8.0} for number, loss in enumerate(losses)]


def model(*found, **by_context):
    needle = [{"length": 512 * 2**number, "accuracy": share, "exact": 0.0} for number, share in enumerate(found)]
    return {"by_context": by_context, "needle": needle}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    monkeypatch.setattr(contexts.Figure, "savefig", lambda figure, path, **_: figures.append((figure, path)))
    return figures


def test_curves_are_the_losses_and_the_shares_of_each_model(drawn, tmp_path):
    a = model(0.9, 0.5, **{"4": ranges(3, 2, 1), "8": ranges(3, 2, 1, 0.5)})
    models = {"a": a, "b": model(0.1, **{"4": ranges(4, 3, 2.5)})}
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(models))
    contexts.main([str(path)])
    ((figure, saved),) = drawn
    assert saved == tmp_path / "figures.png"
    losses, needles = ({line.get_label(): line for line in axes.lines} for axes in figure.axes)
    assert list(losses) == ["a, rows of 4", "a, rows of 8", "b, rows of 4"]
    assert losses["a, rows of 8"].get_xydata().tolist() == [[1, 3], [2, 2], [4, 1], [8, 0.5]]
    assert losses["b, rows of 4"].get_ydata().tolist() == [4, 3, 2.5]
    assert losses["a, rows of 4"].get_linestyle() != losses["a, rows of 8"].get_linestyle()
    assert needles["a"].get_xydata().tolist() == [[512, 0.9], [1024, 0.5]]
    assert needles["b"].get_xydata().tolist() == [[512, 0.1]]
