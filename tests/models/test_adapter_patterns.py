"""Regular expressions in an adapter's config: plain ones mean what they mean to PEFT, others are refused."""

from __future__ import annotations

import re

import pytest

from swarmkit.errors import AdapterError
from swarmkit.models.adapters.files import check_config
from swarmkit.models.adapters.patterns import alpha_of, check_patterns

PATH = "model.layers.3.self_attn.q_proj"
GOOD = [
    "q_proj",
    "self_attn.q_proj",
    r"self_attn\.q_proj",
    "layers.3.*.q_proj",
    r"layers\.\d+\.self_attn\.q_proj",
    "(q|v)_proj",
    "^model.layers.3.self_attn.q_proj",
    "up_proj",
    "roj",
]
BAD = [
    "(a+)+$",
    "(a*)*b",
    "([a-z_.]+)*x",
    "(.*)*",
    "(a|a)*b",
    "(a|aa)+$",
    r"(\w+\d?)+$",
    "(?:(?:a+)?)+b",
    "".join(["(a|a)"] * 20) + "b",
    r"(a+)\1",
    ".*.*.*.*x",
    "(",
    "a" * 5000,
    7,
]


@pytest.mark.parametrize("pattern", GOOD)
def test_a_plain_expression_means_what_it_means_to_peft(pattern: str) -> None:
    config = {"lora_alpha": 8, "alpha_pattern": {pattern: 32}}
    check_patterns(config)
    of_peft = 32 if re.match(rf"(.*\.)?({pattern})$", PATH) else 8
    assert alpha_of(config, PATH) == of_peft


def test_the_first_expression_that_matches_counts() -> None:
    config = {"alpha_pattern": {"k_proj": 1, "layers.*.q_proj": 2, "q_proj": 3}}
    assert alpha_of(config, PATH) == 2


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("pattern", BAD, ids=lambda pattern: str(pattern)[:20])
def test_an_expression_that_could_take_for_ever_is_refused(field: str, pattern: object) -> None:
    with pytest.raises(AdapterError, match=field):
        check_patterns({field: {pattern: 1}})


@pytest.mark.parametrize("pattern", ["(a+)+$", "([a-z_.]+)*x", ".*" * 9])
def test_the_expression_for_layers_is_checked_as_well(pattern: str) -> None:
    with pytest.raises(AdapterError, match="target_modules"):
        check_config({"peft_type": "LORA", "target_modules": pattern})


@pytest.mark.parametrize(
    "pattern",
    [
        "all-linear",
        r".*\.(q|k|v|o)_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj|v_proj|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)",
    ],
)
def test_expressions_that_tools_write_are_taken(pattern: str) -> None:
    check_config({"peft_type": "LORA", "target_modules": pattern})


def test_many_expressions_are_refused_where_their_names_are_not() -> None:
    check_patterns({"alpha_pattern": {f"layers.{number}.q_proj": 1 for number in range(4000)}})
    with pytest.raises(AdapterError, match="alpha_pattern"):
        check_patterns({"alpha_pattern": {f"layers.{number}.*.q_proj": 1 for number in range(4000)}})
    with pytest.raises(AdapterError, match="at most"):
        check_patterns({"alpha_pattern": {f"layers.{number}.q_proj": 1 for number in range(5000)}})
