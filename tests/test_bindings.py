"""Bindings: the grammar, what each mistake is told, and that written configurations read back."""

import dataclasses
from typing import ClassVar, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.bindings import apply, difference, literal, operative, parse, read_bindings
from dsv3.config import AuxFree, AuxLoss, Config, Moe, Phase, Yarn
from dsv3.errors import ConfigError
from dsv3.schema import Section, field_types, is_section, is_union, variants


def bound(*lines):
    return apply(Config(), parse("\n".join(lines)))


# --- grammar -----------------------------------------------------------------------------------


def test_every_form_of_the_grammar():
    config = bound(
        "# a comment",
        "model.width = 128  # after a binding",
        "data.corpus = 'a#b = [c'",
        "",
        "training.batch = [('constant', 0.5, 8),  # in brackets",
        "                  ('linear', 1.0, 32)]",
        "model.mla.query_latent=None",
        "training.learning_rate = 1e-3",
        "training.clip_norm = inf",
        "reporting.plots = False",
    )
    assert config.model.width == 128
    assert config.data.corpus == "a#b = [c"
    assert config.training.batch == (Phase("constant", 0.5, 8.0), Phase("linear", 1.0, 32.0))
    assert isinstance(config.training.batch[1], Phase)
    assert config.model.mla.query_latent is None
    assert config.training.learning_rate == 0.001
    assert config.training.clip_norm == float("inf")
    assert config.reporting.plots is False


@pytest.mark.parametrize("word", ["float32", "a/b-c.txt", "/data/*.jsonl.gz", "~/books", "../x"])
def test_bare_words_are_strings_because_shells_eat_quotes(word):
    assert parse(f"data.corpus = {word}")[0].value == word


@pytest.mark.parametrize(
    "text",
    ["model.width", "model.width = ", "model.width = [1,\nmodel.layers = 2", "model.width = 25O",
     "model.width = 2 3", "model.width == 3", "model.width = print(1)", "model.width = 'a",
     "model.width = 1; model.layers = 2", "include", "include 3", "data.corpus = a b", "= 3",
     "model.width = 3)", "model.width = \x00", "model.width = " + "[" * 5000, "model.width = 1 + a",
     "model.width = " + "9" * 5000],
)  # fmt: skip
def test_what_is_no_binding_is_refused(text):
    with pytest.raises(ConfigError, match=r"^--set"):
        apply(Config(), parse(text))


@given(st.text(alphabet="ab.='\"[](){}#\n\r \\0-+,:") | st.text())
def test_any_text_is_bindings_or_a_config_error(text):
    try:
        parse(text)
    except ConfigError as error:
        assert str(error).startswith("--set")


def test_later_bindings_override_earlier_ones():
    assert bound("model.width = 1", "model.width = 2").model.width == 2
    kept = bound("model.moe.balance = 'aux_loss'", "model.moe.balance.alpha = 0.5")
    assert kept.model.moe.balance == AuxLoss(alpha=0.5)
    replaced = bound(
        "model.moe.balance = 'aux_loss'",
        "model.moe.balance.alpha = 0.5",
        "model.moe.balance = 'aux_free'",
    )
    assert replaced.model.moe.balance == AuxFree()


def test_fields_that_depend_on_each_other_may_be_bound_in_any_order():
    lines = ["model.moe.groups = 6", "model.moe.routed_experts = 24"]
    assert bound(*lines) == bound(*reversed(lines))


def test_a_mapping_has_no_order():
    bindings = {"model.moe.balance.alpha": 0.5, "model.moe.balance": "aux_loss"}
    backwards = dict(reversed(bindings.items()))
    config = apply(Config(), bindings)
    assert config == apply(Config(), backwards)
    assert config.model.moe.balance == AuxLoss(alpha=0.5)


def test_sum_types_and_optional_sections():
    assert bound("model.mla.yarn = 'yarn'").model.mla.yarn == Yarn()
    assert bound("model.mla.yarn = 'yarn'", "model.mla.yarn.factor = 4").model.mla.yarn == Yarn(4.0)
    assert bound("model.mla.yarn = 'yarn'", "model.mla.yarn = None").model.mla.yarn is None
    assert apply(Config(), {"model.moe": Moe(block=64)}).model.moe.block == 64


def test_the_base_is_left_as_it_was():
    base = Config()
    assert apply(base, {"model.width": 3}) != base
    assert base == Config()


# --- includes ----------------------------------------------------------------------------------


def test_includes_are_relative_to_the_including_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/leaf.gin").write_text("model.width = 7\n")
    (tmp_path / "sub/base.gin").write_text("include 'leaf.gin'\nmodel.layers = 7\n")
    (tmp_path / "top.gin").write_text("include 'sub/base.gin'  # first\nmodel.layers = 9\n")
    config = apply(Config(), read_bindings(tmp_path / "top.gin"))
    assert (config.model.width, config.model.layers) == (7, 9)


def test_a_file_may_be_included_twice_but_not_by_itself(tmp_path):
    (tmp_path / "leaf.gin").write_text("model.width = 7\n")
    (tmp_path / "twice.gin").write_text("include 'leaf.gin'\ninclude 'leaf.gin'\n")
    assert len(read_bindings(tmp_path / "twice.gin")) == 2
    (tmp_path / "a.gin").write_text("\ninclude 'b.gin'\n")
    (tmp_path / "b.gin").write_text("include 'a.gin'\n")
    with pytest.raises(ConfigError, match=r"a\.gin:2: .*b\.gin:1: .*a\.gin → b\.gin → a\.gin"):
        read_bindings(tmp_path / "a.gin")


def test_a_missing_file_is_told_its_nearest_neighbour(tmp_path):
    (tmp_path / "base.gin").touch()
    (tmp_path / "top.gin").write_text("include 'bsae.gin'\n")
    with pytest.raises(ConfigError, match=r"top\.gin:1: .*bsae\.gin; did you mean 'base\.gin'"):
        read_bindings(tmp_path / "top.gin")
    with pytest.raises(ConfigError, match=r"no bindings file .*nowhere"):
        read_bindings(tmp_path / "nowhere/x.gin")


def test_files_that_are_no_text_are_refused_and_windows_text_is_read(tmp_path):
    file = tmp_path / "x.gin"
    file.write_bytes(b"model.width = \xff\xfe")
    with pytest.raises(ConfigError, match=r"x\.gin is no UTF-8 text"):
        read_bindings(file)
    file.write_bytes(b"\xef\xbb\xbfmodel.width = 3\r\nmodel.layers = 2\r\n")
    assert [b.value for b in read_bindings(file)] == [3, 2]


# --- what mistakes are told --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("model.moe.expert_per_token = 4", "did you mean 'experts_per_token'"),
        ("moe.experts_per_token = 4", "did you mean 'model.moe.experts_per_token'"),
        ("modle.width = 4", "did you mean 'model.width'"),
        ("seed = 4", "did you mean 'data.seed' or 'training.seed'"),
        ("width = 4", "did you mean 'model.width'"),
        ("modle.breadth = 4", "did you mean 'model'"),
        ("model.zzzz = 4", "valid: "),
        ("model.width = '4'", "model.width wants int, got '4'"),
        ("model.width = 4.0", "model.width wants int, got 4.0"),
        ("model.width = True", "model.width wants int, got True"),
        ("reporting.plots = 1", "reporting.plots wants bool, got 1"),
        ("training.learning_rate = fast", "training.learning_rate wants float, got 'fast'"),
        ("training.learning_rate = nan", "training.learning_rate wants float, got 'nan'"),
        ("training.learning_rate = " + "9" * 400, "training.learning_rate wants a float"),
        ("model.mla.query_latent = 1.5", "query_latent wants int or None, got 1.5"),
        ("model.moe = 'x'", "model.moe wants Moe, got 'x'"),
        ("training.compute_dtype = 'float33'", "did you mean 'float32'"),
        ("model.moe.balance = 'aux_fee'", "did you mean 'aux_free'"),
        ("training.batch = [('linear', 1)]", "training.batch[0] wants 3 entries, got 2"),
        ("training.batch = [('lineal', 1, 8)]", "did you mean 'linear'"),
        ("model.width.x = 4", "model.width is 256, it has no fields"),
        ("model.mla.yarn.factor = 4", "model.mla.yarn is None, set model.mla.yarn = 'yarn' first"),
        ("model.moe.balance.alpha = 1", "is 'aux_free', set model.moe.balance = 'aux_loss' first"),
        ("model.moe.balance.beta = 1", "model.moe.balance has no 'beta'"),
        ("model.dot.tilt = 1", "model.dot has no 'tilt'"),
        ("model..width = 1", "did you mean 'model.width'"),
    ],
)
def test_mistakes_are_named_with_file_line_and_remedy(line, told):
    with pytest.raises(ConfigError) as raised:
        apply(Config(), parse(f"model.layers = 3\n{line}", "x.gin"))
    message = str(raised.value)
    assert message.startswith("x.gin:2: ")
    assert told in message
    assert line.split(" ")[0] in message


@dataclasses.dataclass(frozen=True)
class Inner(Section):
    path: ClassVar[str] = "inner"
    low: int = 1
    high: int = 2
    step: int = 1

    def validate(self):
        self.require(self.low < self.high, "low", f"must be below inner.high = {self.high}")
        self.require(self.step < self.high - self.low + 1, "step", "exceeds the range")


@dataclasses.dataclass(frozen=True)
class Outer(Section):
    inner: Inner = Inner()
    other: int = 0


@pytest.mark.parametrize(
    ("lines", "places"),
    [
        (["other = 1", "inner.low = 3"], "x.gin:2"),
        (["inner.high = 0", "other = 1"], "x.gin:1"),
        (["inner.low = 5", "inner.high = 4"], "x.gin:1, x.gin:2"),
        (["inner.high = 9", "inner.high = 0"], "x.gin:2"),
        (["inner.step = 3", "inner.high = 3", "other = 1"], "x.gin:1"),
        (["inner.high = 9", "inner.low = 8", "inner.step = 3"], "x.gin:3"),
        (["inner.low = 2", "inner.high = 3", "inner.low = 1", "inner.step = 4"], "x.gin:4"),
    ],
)
def test_contradictions_name_the_lines_that_made_them(lines, places):
    with pytest.raises(ConfigError) as raised:
        apply(Outer(), parse("\n".join(lines), "x.gin"))
    assert str(raised.value).startswith(f"{places}: inner.")


def test_contradictions_of_unbound_fields_name_the_lines_beside_them():
    with pytest.raises(ConfigError, match=r"x\.gin:1, x\.gin:3: inner\.step = 4 exceeds"):
        base = Outer(Inner(high=9, step=4))
        apply(base, parse("inner.low = 7\nother = 1\ninner.high = 8", "x.gin"))


def test_origin_is_the_flag_for_a_single_binding():
    with pytest.raises(ConfigError, match=r"^--set: unknown path model\.widht"):
        apply(Config(), parse("model.widht = 3"))


# --- writing -----------------------------------------------------------------------------------

TEXTS = st.text(max_size=8) | st.sampled_from(["'\"", "a\nb", "\\n", "#", "\ud800", "inf", "None"])
PLAIN = {
    float: st.floats(allow_nan=False) | st.floats(0, 1),
    int: st.integers(-9, 9),
    str: TEXTS,
    bool: st.booleans(),
    type(None): st.none(),
}


def values(annotation):
    """Values of a field, many of which sections will refuse."""
    if annotation in PLAIN:
        return PLAIN[annotation]
    if is_section(annotation):
        return st.just(annotation())
    if is_union(annotation):
        return st.one_of(*map(values, get_args(annotation)))
    if hasattr(annotation, "_fields"):
        return st.builds(annotation, *map(values, field_types_of(annotation)))
    if get_args(annotation)[-1] is Ellipsis:
        return st.lists(values(get_args(annotation)[0]), max_size=3).map(tuple)
    return st.sampled_from(get_args(annotation))


def field_types_of(named_tuple):
    return [named_tuple.__annotations__[name] for name in named_tuple._fields]


def replaced(draw, section):
    """`section` with one field, anywhere below it, replaced without the help of bindings."""
    types = field_types(type(section))
    if not types:
        return section
    name = draw(st.sampled_from(sorted(types)))
    old = getattr(section, name)
    new = (
        replaced(draw, old)
        if isinstance(old, Section) and (not variants(types[name]) or draw(st.booleans()))
        else draw(values(types[name]))
    )
    try:
        return dataclasses.replace(section, **{name: new})
    except ConfigError:
        return section


@st.composite
def configs(draw):
    config = Config()
    for _ in range(draw(st.integers(0, 12))):
        config = replaced(draw, config)
    return config


@given(configs())
def test_the_operative_configuration_reproduces_the_run(config):
    assert apply(Config(), parse(operative(config))) == config


@given(configs(), configs())
def test_the_difference_is_enough(config, base):
    changes = difference(config, base)
    assert apply(base, changes) == config
    text = "\n".join(f"{path} = {literal(value)}" for path, value in changes.items())
    assert apply(base, parse(text)) == config
    assert difference(config, config) == {}


def test_the_difference_is_small():
    config = apply(Config(), {"model.moe.balance": AuxLoss(alpha=0.5), "training.seed": 3})
    expected = {
        "model.moe.balance": "aux_loss",
        "model.moe.balance.alpha": 0.5,
        "training.seed": 3,
    }
    assert difference(config, Config()) == expected


def test_every_alternative_can_be_named():
    """A section in a union has a tag, its own in that union, and defaults: text can choose it."""
    kinds = [Config]
    for kind in kinds:
        for annotation in field_types(kind).values():
            members = get_args(annotation) if is_union(annotation) else (annotation,)
            sections = [m for m in members if is_section(m)]
            if is_union(annotation) and sections:
                assert set(variants(annotation).values()) == set(sections)
                assert all(section() is not None for section in sections)
            kinds += sections
    assert AuxLoss in kinds
