"""What an adapter's configuration says of its factors: one schema for all of it.

The other fields of `adapter_config.json` change nothing, or are refused where they are set
(`fields.py`).
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from spectr_demo.experts.messages import short, shown
from spectr_demo.experts.patterns import (
    MOST_CHARACTERS,
    MOST_EXPRESSIONS,
    MOST_PATTERNS,
    Clock,
    Targets,
    check_expression,
    is_plain,
    of_layers,
    of_value,
)

MOST_RANK = 2048
MOST_ALPHA = 1e6  # of either sign: a negative one takes the adapter off
_ALL_LINEAR = "all-linear"

Text = Annotated[StrictStr, Field(max_length=MOST_CHARACTERS)]
Rank = Annotated[StrictInt, Field(ge=1, le=MOST_RANK)]
Alpha = Annotated[
    StrictInt | StrictFloat, Field(ge=-MOST_ALPHA, le=MOST_ALPHA, allow_inf_nan=False)
]
Number = Annotated[StrictInt, Field(ge=-(10**6), le=10**6)]


def _clock(info: ValidationInfo) -> Clock:
    assert isinstance(info.context, Clock)
    return info.context


def _check_keys(patterns: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any]:
    patterns = patterns or {}
    expressions = [pattern for pattern in patterns if not is_plain(pattern)]
    if len(expressions) > MOST_EXPRESSIONS:
        raise ValueError(f"{len(expressions)} of its patterns are expressions")
    for pattern in expressions:
        check_expression(of_value(pattern), pattern, _clock(info))
    return patterns


def _check_expression(names: Any, info: ValidationInfo) -> Any:
    if isinstance(names, str):
        check_expression(names, names, _clock(info))
    return names


def _check_layers(patterns: Any, info: ValidationInfo) -> Any:
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        check_expression(of_layers(pattern), pattern, _clock(info))
    return patterns


Keys = Field(max_length=MOST_PATTERNS)
NamesOrExpression = Annotated[
    StrictStr | Annotated[list[Text], Keys], AfterValidator(_check_expression)
]


class LoraSettings(BaseModel):
    """The fields that decide what the weights mean; each description says what was needed."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    r: Rank = Field(8, description=f"a whole number from 1 to {MOST_RANK}")
    lora_alpha: Alpha = Field(8, description=f"a number from {-MOST_ALPHA:g} to {MOST_ALPHA:g}")
    use_rslora: StrictBool | None = Field(False, description="true or false")
    rank_pattern: Annotated[
        Annotated[dict[Text, Rank], Keys] | None, AfterValidator(_check_keys)
    ] = Field({}, description=f"up to {MOST_PATTERNS} names or expressions with a rank each")
    alpha_pattern: Annotated[
        Annotated[dict[Text, Alpha], Keys] | None, AfterValidator(_check_keys)
    ] = Field({}, description=f"up to {MOST_PATTERNS} names or expressions with an alpha each")
    target_modules: NamesOrExpression = Field(
        description=f"the layers: up to {MOST_PATTERNS} names, or an expression"
    )
    exclude_modules: NamesOrExpression | None = Field(
        None, description=f"up to {MOST_PATTERNS} names, or an expression"
    )
    layers_to_transform: Number | Annotated[list[Number], Keys] | None = Field(
        None, description="the numbers of layers"
    )
    layers_pattern: Annotated[
        Text | Annotated[list[Text], Field(max_length=100)] | None, AfterValidator(_check_layers)
    ] = Field(None, description="up to 100 names or expressions")
    base_model_name_or_path: StrictStr | None = Field(None, description="a text")

    @model_validator(mode="after")
    def _as_in_peft(self) -> "LoraSettings":
        if isinstance(self.target_modules, str):
            for field in ("layers_to_transform", "layers_pattern"):
                if getattr(self, field) is not None:
                    raise ValueError(f"{field} needs target_modules that are a list of names")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        return self

    @classmethod
    def of(cls, values: Mapping[str, Any], clock: Clock) -> "LoraSettings":
        """Those in a configuration. Raises ValidationError, of which `faults` tells."""
        return cls.model_validate(values, context=clock)

    @property
    def base_model(self) -> str:
        return shown(self.base_model_name_or_path or "an unnamed base")

    def targets(self, clock: Clock) -> Targets:
        """The layers that have factors."""
        named, layers, places = self.target_modules, self.layers_to_transform, self.layers_pattern
        if isinstance(named, str) and named.lower() == _ALL_LINEAR:
            named = ".*"  # those that have factors
        return Targets(
            named,
            self.exclude_modules or (),
            [layers] if isinstance(layers, int) else layers or [],
            [places] if isinstance(places, str) else places or [],
            clock,
        )


def faults(values: Mapping[str, Any], error: ValidationError) -> str:
    """All that a schema found wrong in a configuration, in one line."""
    found: dict[str, str] = {}
    for each in error.errors(include_url=False):
        field = str(each["loc"][0]) if each["loc"] else ""
        reason = each.get("ctx", {}).get("error")
        detail = f" ({shown(reason)})" if isinstance(reason, ValueError) and field else ""
        if not field:
            found[field] = str(reason)
        elif field not in found or detail:
            has = f"is {short(values[field])}" if field in values else "is missing"
            needed = LoraSettings.model_fields[field].description
            found[field] = f"{field} {has}, needed: {needed}{detail}"
    return "; ".join(found.values())
