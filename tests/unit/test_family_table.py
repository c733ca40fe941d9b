"""README's table of families: what is read from the tests' marks, and that README holds it."""

import pytest
from pix2pix_zero.devtools import family_table
from pix2pix_zero.devtools.family_table import is_up_to_date, proven, rewritten, table

CLAIMS = """
import pytest
from flow_families import FAMILIES
from elsewhere import OTHERS

LATE = ["Flux", "SD 3"]

@pytest.mark.works("Invert Picture", "KSampler")
@pytest.mark.parametrize("family", ["sd15", "koala-1b"])
def test_alone(family): ...

@pytest.mark.works("Plug-and-Play")
@pytest.mark.parametrize(("family", "kind"), [("sdxl", 1), ("sd15", 2)])
def test_with_another(family, kind): ...

@pytest.mark.works("FlowEdit", family=FAMILIES)
def test_of_a_helper(): ...

@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.works("KSampler", family=LATE)
def test_of_a_constant(steps): ...

@pytest.mark.works("Feature PCA", family=("flow", "Flux"))
def test_named(): ...

def test_without_a_claim(): ...
"""
HELPER = "FAMILIES = {'Qwen-Image': make(16), 'Flux': make(4), **MORE}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in (("host/test_claims.py", CLAIMS), ("helpers/flow_families.py", HELPER)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(family_table, "TESTS", tmp_path)
    return tmp_path


def test_families_are_those_of_parameters_constants_helpers_and_names(folder):
    assert list(proven(folder).items()) == [
        ("SD 1.x", {"Invert Picture", "KSampler", "Plug-and-Play"}),
        ("SDXL", {"Plug-and-Play"}),
        ("SSD-1B, Vega, KOALA", {"Invert Picture", "KSampler"}),
        (family_table.FLOW_UNETS, {"Feature PCA"}),
        ("Flux", {"FlowEdit", "KSampler", "Feature PCA"}),
        ("Qwen-Image", {"FlowEdit"}),
        ("SD 3", {"KSampler"}),
    ]


@pytest.mark.parametrize(
    "mark",
    [
        'works("Sampler", family="Flux")',
        'works("KSampler")',
        'works("KSampler", family=OTHERS)',
        'works("KSampler", family=[name for name in LATE])',
    ],
)
def test_a_claim_that_cannot_be_read_is_refused_by_file_and_test(folder, mark):
    path = folder / "host" / "test_claims.py"
    path.write_text(CLAIMS + f"\n@pytest.mark.{mark}\ndef test_bad(): ...\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^test_claims.py, test_bad: "):
        proven(folder)


def test_a_row_ticks_what_is_proven():
    lines = table({"Flux": {"FlowEdit", "KSampler"}}).splitlines()
    assert lines[2] == "| Flux |  |  | ✓ | ✓ |  |  |  |  |"
    assert len({line.count("|") for line in lines}) == 1


def test_the_page_keeps_what_is_around_the_table():
    page = "a\n<!-- families -->\nold\n<!-- /families -->\nb\n"
    again = rewritten(page, {"Flux": set()})
    assert again.startswith("a\n<!-- families -->\n\n|") and again.endswith("|\n\n<!-- /families -->\nb\n")
    assert "old" not in again and rewritten(again, {"Flux": set()}) == again
    with pytest.raises(ValueError, match="families"):
        rewritten("no marks", {})


def test_the_table_of_the_readme_is_up_to_date():
    assert is_up_to_date(), "run `python dev.py docs`"
