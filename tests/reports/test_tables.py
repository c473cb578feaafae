"""The table: whose numbers stand where, in Markdown and in LaTeX."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from results_files import COLUMNS, gathered, results, score

from spak_jax.reports.tables import BY_KIND, latex_table, markdown_table, table_rows


def rows_of(table):
    """The cells of all tables in a Markdown text, by the first cell."""
    rows = {}
    for line in table.splitlines():
        if line.startswith("|"):
            label, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            rows.setdefault(label, []).append(cells)
    return rows


def test_table_holds_our_numbers_beside_the_published_ones():
    systems = {
        ("gpt12", "GPT-12L (Static)", None, None): "61.90",
        ("loop12", "LoopLM-12 (Dynamic)", 12, 12): "80.00",
        ("loop30", "LoopLM-30 (Deep Thinking)", 30, 30): "95.24",
        ("loop128e", "LoopLM-128e (Efficient)", 24, 24): "76.19",
        ("loop12", "LoopLM-12 (Dynamic)", 12, 24): "78.10",
        ("loop12-w768", "LoopLM-12 (Dynamic), 768 wide", 12, 12): "-",
    }
    evaluated, _ = gathered(*(results(*system) for system in systems))
    table = markdown_table(evaluated)
    rows = rows_of(table)
    for (name, system, trained, loops), published in systems.items():
        by_column, by_length = rows[system if loops == trained else f"{system} at 24 loops"]
        assert by_column[0] == "793,600"
        assert by_column[1::2] == [
            "99.9 (96.9-100.0)",
            "88.8 (85.8-91.8)",
            "77.7 (74.7-80.7)",
            "66.6 (63.6-69.6)",
            "55.5 (52.5-58.5)",
        ]
        eight = {"loop30": "2.59", "loop12-w768": "-"}.get(name, "0.00")
        assert by_column[4] == published and by_column[6] == eight
        assert by_length == [
            "44.0 (41.0-47.0)",
            "36.0 (33.0-39.0)",
            "20.0 (17.0-23.0)",
            "4.0 (1.0-7.0)",
        ]
    for expected in (
        "NVIDIA H100 80GB HBM3, 2026-11-22, training seed 0, 1,000 problems a length",
        "commit 0123456789ab+changes.",
        "5-6 really holds 5, 6 and 7 digits, 8 holds 8 and 9, 10 holds 10 and 11",
    ):
        assert expected in table


@pytest.mark.parametrize(
    ("correct", "low", "high", "shown"),
    [
        (0, 0.0, 0.00008, "0.0 (0.0-0.1)"),
        (1000, 0.9996, 1.0, "100.0 (99.9-100.0)"),
        (647, 0.641, 0.653, "64.7 (64.1-65.3)"),
    ],
)
def test_bounds_are_rounded_outwards_so_that_none_reads_as_certainty(correct, low, high, shown):
    own = score(correct) | {"low": low, "high": high}
    evaluated, _ = gathered(results(lengths={"8": own}))
    assert rows_of(markdown_table(evaluated))["LoopLM-12 (Dynamic)"][1] == [shown]
    assert shown.split()[1].replace("-", "--") in latex_table(evaluated)


def test_seeds_that_agree_have_an_interval_and_the_footnote_says_which():
    none_right = {c: score(0, 10_000, zero_shot=True) for c in COLUMNS}
    evaluated, _ = gathered(*(results(seed=s, published_columns=none_right) for s in range(5)))
    table = markdown_table(evaluated)
    assert rows_of(table)["LoopLM-12 (Dynamic), 5 seeds"][0][1::2] == ["0.0 (0.0-0.1)"] * 5
    assert "training seeds 0-4" in table
    assert "widened where the Wilson interval of all their problems together reaches" in table


def test_systems_of_other_seeds_say_which_are_theirs():
    evaluated, _ = gathered(results(seed=4), results(seed=7, name="b", system="B"))
    assert "Training seeds: LoopLM-12 (Dynamic) 4; B 7." in markdown_table(evaluated)
    evaluated, _ = gathered(results(seed=4), results(seed=4, name="b", system="B"))
    assert "Training seeds:" not in markdown_table(evaluated)


def test_a_column_of_trained_lengths_says_so():
    def with_share(share, **more):
        column = score(10) | {"trained_share": share}
        return results(published_columns={"5-6": column, "8": score(0, zero_shot=True)}, **more)

    evaluated, _ = gathered(with_share(0.609), with_share(0.613, name="b", system="B"))
    expected = r"Of a column's problems, of trained lengths: 5-6 60.9 to 61.3%."
    assert expected in markdown_table(evaluated)
    evaluated, _ = gathered(results(), results(name="b", system="B"))
    assert "of trained lengths:" not in markdown_table(evaluated)


def test_halting_is_not_set_beside_a_published_number_scored_without():
    [line], _ = gathered(results(halting=[0.9, 0.999]))
    assert table_rows([line])[0].published == [None] * 5


def test_only_strict_lengths_that_were_scored_have_a_column():
    partly = results(lengths={"8": score(10, zero_shot=True), "9": score(5, zero_shot=True)})
    evaluated, _ = gathered(partly)
    headings = rows_of(markdown_table(evaluated))["System"]
    assert headings[1] == ["8 digits"]
    assert r"every input exactly & 8 digits \\" in latex_table(evaluated)


def test_long_lengths_have_a_column_where_any_system_was_scored_there():
    far = results(lengths={"100": score(990), "1000": score(90, 100), "10000": score(5, 10)})
    evaluated, _ = gathered(far, results("near", "Near"))
    rows = rows_of(markdown_table(evaluated))
    expected = ["7", "8", "10", "12", "100", "1,000", "10,000"]
    assert rows["System"][1] == [f"{length} digits" for length in expected]
    assert rows["LoopLM-12 (Dynamic)"][1][3:] == [
        "-",
        "99.0 (96.0-100.0)",
        "90.0 (87.0-93.0)",
        "50.0 (47.0-53.0)",
    ]
    assert rows["Near"][1][3:] == ["4.0 (1.0-7.0)", "-", "-", "-"]
    assert r"& 1,000 digits & 10,000 digits \\" in latex_table(evaluated)


def of_kinds(seed=0, **kinds):
    """A run scored at 1, 2, 3 and 10,000 digits, and there on kinds with so many wrong of all."""

    def lengths(wrong, total):
        at_each = {str(n): score(total, total) for n in (1, 2, 3)}
        return at_each | {"10000": score(total - wrong, total)}

    return results(
        seed=seed,
        lengths=lengths(1, 250_000),
        kinds={kind.replace("_", "-"): lengths(*counts) for kind, counts in kinds.items()},
    )


def test_wrong_answers_by_kind_are_pooled_over_lengths_and_seeds():
    evaluated, _ = gathered(
        of_kinds(seed=0, nines=(2, 2), all_carry=(1234, 250_000)),
        of_kinds(seed=1, nines=(0, 2), all_carry=(0, 250_000)),
        results("other", "Other", kinds={"no-carry": {str(n): score(1000) for n in range(1, 13)}}),
    )
    table = markdown_table(evaluated)
    rows = rows_of(table)
    assert "Wrong answers of all, over all lengths scored." in table
    assert "nines: 99...9 + 1; all-carry: every place carries;" in table
    assert rows["System"][2] == ["uniform", "nines", "all-carry", "no-carry", "lengths"]
    uniform = f"{80 * sum(range(1, 13)):,} / 12,000"
    assert rows["Other"][2] == [uniform, "-", "-", "0 / 12,000", "1-12"]
    counts = ["2 / 2,000,000", "2 / 16", "1,234 / 2,000,000"]
    assert rows["LoopLM-12 (Dynamic), 2 seeds"][2] == [*counts, "-", "1-3, 10000"]
    latex = latex_table(evaluated)
    assert r"wrong answers of all & uniform & nines & all-carry & no-carry & lengths \\" in latex
    expected = " & ".join(["LoopLM-12 (Dynamic), 2 seeds", *counts, "--", "1--3, 10000"])
    assert rf"{expected} \\" in latex


def test_kinds_scored_at_other_lengths_than_the_plain_additions_say_at_which():
    evaluated, _ = gathered(results(kinds={"nines": {"1": score(2, 2), "2": score(1, 2)}}))
    cells = rows_of(markdown_table(evaluated))["LoopLM-12 (Dynamic)"][2]
    assert cells[1:] == ["1 / 4 (1-2)", "1-12"]


def test_no_table_by_kind_where_none_was_scored():
    evaluated, _ = gathered(results(kinds={}))
    for table in (markdown_table(evaluated), latex_table(evaluated)):
        assert "rong answers" not in table and "nines" not in table


def test_own_problems_have_no_row():
    own = results(
        lengths={"3": score(9, 10)}, published_columns={}, problems="mine.txt", examples=10
    )
    evaluated, _ = gathered(own, results())
    assert [row.label for row in table_rows(evaluated)] == ["LoopLM-12 (Dynamic)"]
    assert "mine.txt" not in markdown_table(evaluated)


def test_names_are_escaped():
    evaluated, _ = gathered(results("other", r"50% & a_b|c #1 \x {y} $z$"))
    latex = latex_table(evaluated)
    expected = r"50\% \& a\_b\textbar{}c \#1 \textbackslash{}x \{y\} \$z\$"
    assert f"{expected} & 793,600 & 99.9 & -- &" in latex
    assert r"a\_b\|c" in markdown_table(evaluated)


def test_latex_rows_have_as_many_cells_as_the_heading():
    evaluated, _ = gathered(results(), results("gpt12", "GPT-12L (Static)", None, None))
    latex = latex_table(evaluated)
    first, second = latex.split(r"\bottomrule")[:2]
    for part, cells in ((first, 12), (second, 5)):
        body = part.split(r"\midrule")[1].strip().splitlines()
        assert len(body) == 4
        assert all(row.count("&") == cells - 1 and row.endswith(r"\\") for row in body)


@st.composite
def scores(draw):
    total = draw(st.integers(1, 10**6))
    correct = draw(st.integers(0, total))
    accuracy = correct / total
    return score(correct, total, draw(st.booleans())) | {
        "low": draw(st.floats(0, accuracy)),
        "high": draw(st.floats(accuracy, 1)),
    }


@st.composite
def valid_results(draw):
    trained = draw(st.none() | st.integers(1, 100))
    by_length = st.dictionaries(st.integers(1, 1000).map(str), scores(), max_size=4)
    lengths = draw(by_length.filter(bool))
    kinds = st.dictionaries(st.sampled_from(["nines", "all-carry", "a & b"]), by_length)
    columns = st.dictionaries(st.sampled_from([*COLUMNS, "another"]), scores(), max_size=3)
    return results(
        draw(st.sampled_from(["gpt12", "loop12", "x"])),
        draw(st.text(min_size=1, max_size=12)),
        trained,
        trained and draw(st.integers(1, 100)),
        draw(st.integers(0, 2)),
        lengths=lengths,
        published_columns=draw(columns),
        kinds=draw(kinds),
        halting=draw(st.none() | st.just([0.9, 0.999])),
        commit=draw(st.none() | st.text(min_size=1, max_size=8)),
        problems=draw(st.sampled_from([None, None, None, "mine.txt"])),
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(valid_results(), min_size=1, max_size=5))
def test_any_valid_results_give_tables_with_a_row_for_each_system(several):
    evaluated, _ = gathered(*several)
    shown = table_rows(evaluated)
    assert len(shown) == sum(not line.first.problems for line in evaluated)
    if shown:
        table = markdown_table(evaluated)
        by_column = table.split("\n\n")[1].split("\n")
        assert len(by_column) == 2 + len(shown)
        assert len({len(line) for line in by_column}) == 1
        latex = latex_table(evaluated)
        body = latex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().split("\n")
        # Under each row of accuracies one of their intervals.
        assert len(body) == len(shown) * (2 if shown[0].columns else 1)
        if shown[0].kinds:
            by_kind = table.split(BY_KIND)[1].split("\n\n")[1].split("\n")
            assert len(by_kind) == 2 + len(shown)
            assert len({len(line) for line in by_kind}) == 1
            body = latex.split(r"\midrule")[-1].split(r"\bottomrule")[0].strip().split("\n")
            cells = 3 + len(shown[0].kinds)
            assert [line.replace(r"\&", "").count("&") for line in body] == [cells - 1] * len(shown)
