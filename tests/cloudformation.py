"""A template of CloudFormation as data: its parameters filled in, its conditions and functions worked out.

Knows what template.yaml uses and says so of anything else. What a resource is called and has is asked of who
makes it: a `Ref` or a `GetAtt` of one that is not made yet makes it first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "template.yaml"

PSEUDO = {
    "AWS::AccountId": "123456789012",  # moto's
    "AWS::Partition": "aws",
    "AWS::Region": "us-east-1",
    "AWS::URLSuffix": "amazonaws.com",
}
NOTHING = object()
"""`AWS::NoValue`: what it stands for is as if it were not there."""

Attribute = Callable[[str, str | None], Any]
"""What `GetAtt` of a resource gives; without an attribute, what `Ref` of it gives."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc] # PyYAML has no types
    """YAML with CloudFormation's short forms: `!Ref a`, `!GetAtt a.b`, `!Sub ...`."""


def _short_form(loader: _Loader, name: str, node: yaml.Node) -> dict[str, Any]:
    if isinstance(node, yaml.ScalarNode):
        value: Any = loader.construct_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        assert isinstance(node, yaml.MappingNode), node
        value = loader.construct_mapping(node, deep=True)
    if name == "GetAtt" and isinstance(value, str):
        value = value.split(".", 1)
    return {name if name in {"Ref", "Condition"} else f"Fn::{name}": value}


_Loader.add_multi_constructor("!", _short_form)


def load(file: Path = TEMPLATE) -> dict[str, Any]:
    """The template, short forms written out."""
    template: dict[str, Any] = yaml.load(file.read_text(), _Loader)
    return template


class Resolver:
    """Works out values of `template`. `given` are parameters, `attribute` knows the resources."""

    def __init__(
        self, template: Mapping[str, Any], given: Mapping[str, Any], attribute: Attribute, stack: str
    ) -> None:
        self._conditions = template["Conditions"]
        self._attribute = attribute
        parameters = {
            name: given.get(name, row.get("Default")) for name, row in template["Parameters"].items()
        }
        if missing := sorted(name for name, value in parameters.items() if value is None):
            raise ValueError(f"parameters without a default or a value: {missing}")
        self.known = {**PSEUDO, "AWS::StackName": stack, "AWS::NoValue": NOTHING, **parameters}

    def holds(self, condition: str) -> bool:
        """Whether the condition of that name is true."""
        return bool(self.value(self._conditions[condition]))

    def holds_for(self, resource: Mapping[str, Any]) -> bool:
        """Whether the template makes this resource."""
        return "Condition" not in resource or self.holds(resource["Condition"])

    def value(self, value: Any) -> Any:
        """`value` with all functions in it worked out; what is `AWS::NoValue` is left out."""
        if isinstance(value, list):
            return [found for item in value if (found := self.value(item)) is not NOTHING]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            ((name, argument),) = value.items()
            if name == "Ref" or name.startswith("Fn::"):
                return self._call(name.removeprefix("Fn::"), argument)
        found = {key: self.value(item) for key, item in value.items()}
        return {key: item for key, item in found.items() if item is not NOTHING}

    def _call(self, name: str, argument: Any) -> Any:
        match name:
            case "Ref":
                return self._ref(argument)
            case "GetAtt":
                return self._attribute(*argument)
            case "Sub":
                return re.sub(r"\$\{([^}]+)\}", lambda found: self._named(found[1]), argument)
            case "If":
                condition, yes, no = argument
                return self.value(yes if self.holds(condition) else no)
            case "Not":
                return not self.value(argument[0])
            case "Equals":
                first, second = map(self.value, argument)
                return str(first) == str(second)
        raise NotImplementedError(f"Fn::{name}")

    def _ref(self, name: str) -> Any:
        return self.known[name] if name in self.known else self._attribute(name, None)

    def _named(self, name: str) -> str:
        resource, dot, attribute = name.partition(".")
        return str(self._attribute(resource, attribute) if dot else self._ref(name))
