"""The catalog, which reads source text, equals the tables of the modules."""

from ddpm import catalog
from ddpm.conditions import CONDITIONS, LAWS
from ddpm.files.data.sources import SOURCES
from ddpm.run import evaluate, fidelity, paper, quality, sample
from ddpm.samplers import SAMPLERS
from ddpm.schedule import SCHEDULES


def test_names_equal_those_of_the_tables():
    assert list(catalog.samplers()) == list(SAMPLERS)
    assert list(catalog.schedules()) == list(SCHEDULES)
    assert tuple(catalog.spacings()) == sample.SPACING_NAMES
    assert list(catalog.metrics()) == [*evaluate.LIKELIHOODS, *fidelity.FIDELITY, *quality.METRICS]
    assert list(catalog.experiments()) == list(paper.EXPERIMENTS)
    assert list(catalog.sources()) == list(SOURCES)
    assert (list(catalog.conditions()), list(catalog.masks())) == (list(CONDITIONS), list(LAWS))


def test_settings_equal_those_of_the_tables():
    for name, entry in catalog.conditions().items():
        for key, value in entry.settings.items():
            assert getattr(CONDITIONS[name], key) == value
    for name, entry in catalog.samplers().items():
        for key, value in entry.settings.items():
            assert getattr(SAMPLERS[name], key) == value
        assert entry.meaning == SAMPLERS[name].meaning
    assert {name for name, entry in catalog.experiments().items() if entry.settings.get("trains")} == {"table2"}


def test_every_entry_has_a_meaning_of_one_line():
    tables = (catalog.samplers, catalog.spacings, catalog.schedules, catalog.metrics, catalog.experiments)
    for table in (*tables, catalog.sources, catalog.conditions, catalog.masks):
        for entry in table().values():
            assert entry.meaning
            assert "\n" not in entry.meaning
