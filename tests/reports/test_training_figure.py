"""Loss over training steps: each run once, and an axis that can be read."""

import pytest
from drawn_figures import legend
from results_files import CURVE, gathered, results

from spak_jax.reports import training_figure


def test_training_draws_each_run_once():
    evaluated, _ = gathered(
        results(training=CURVE),
        results(loops=24, training=CURVE),
        results(seed=1, training=CURVE),
        results("gpt12", "GPT-12L (Static)", None, None),
    )
    figure = training_figure.draw_training(evaluated)
    assert legend(figure) == ["LoopLM-12 (Dynamic), 2 seeds", "validation loss"]
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert [list(curve.get_ydata()) for curve in curves] == [CURVE["loss"]] * 2
    assert figure.axes[0].get_yscale() == "log"
    assert training_figure.draw_training(gathered(results())[0]) is None


@pytest.mark.parametrize(
    ("losses", "ticks"),
    [
        ([2.5, 1e-3, 1e-8], {"10⁰", "10⁻⁸"}),
        ([2.5, 1.0, 0.1], {"2", "1", "0.1"}),
        ([2.5, 2.25, 2.0], {"2.1", "2.4"}),
    ],
)
def test_loss_axis_has_a_few_labels_over_any_range(losses, ticks):
    evaluated, _ = gathered(results(training=CURVE | {"loss": losses, "validation_loss": [2.1]}))
    [axes] = training_figure.draw_training(evaluated).axes
    bottom, top = axes.get_ylim()
    labels = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    shown = [label.get_text() for place, label in labels if bottom <= place <= top]
    assert ticks <= set(shown) and len(shown) <= 10
