"""The bodies and queries of HTTP, each field with its bound, and their way to ``core.request``. Knows no routes.

Bounds come from ``core.request``: what the schema lets through, ``Request.from_wire`` reads once more, so the two
cannot drift apart unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, WithJsonSchema

from core import structured
from core.bounds import (
    BOUNDS,
    LOGIT_BIAS,
    MAX_BAD_WORD_CHARACTERS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIASES,
    MAX_MESSAGES,
    MAX_MODEL_CHARACTERS,
    MAX_PROMPT_CHARACTERS,
    MAX_PROMPT_TOKENS,
    MAX_SALT_CHARACTERS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKEN_ID,
    PRIORITY,
)
from core.errors import InvalidField
from core.request import FIELDS, Kind, Request, SamplingParams
from jobs.job import WEBHOOK_EVENTS, JobState, NewJob, Resume
from jobs.webhooks import MAX_URL_CHARACTERS

MAX_SECONDS = 2_592_000  #: thirty days: the longest deadline and retention a request may ask for
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
MAX_PAGE = 100
MAX_RETRIES = 1_000  #: ids in one body
MAX_HELD_SECONDS = 3_600
MAX_EVENT_NUMBER = 2**53 - 1
JOB_ID = r"^[A-Za-z0-9_-]{1,128}$"

_DEFAULT = SamplingParams()


def bounded(name: str) -> Any:
    """``BOUNDS[name]`` as a pydantic constraint."""
    bound = BOUNDS[name]
    low, high = (int(bound.low), int(bound.high)) if bound.whole else (bound.low, bound.high)
    return Field(gt=low, le=high) if bound.above else Field(ge=low, le=high)


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
Stop = Annotated[StopStrings, BeforeValidator(_listed, json_schema_input_type=StopString | StopStrings)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIdKey = Annotated[str, Field(min_length=1, max_length=len(str(MAX_TOKEN_ID)))]
Bias = Annotated[float, Field(ge=LOGIT_BIAS.low, le=LOGIT_BIAS.high)]
LogitBias = Annotated[dict[TokenIdKey, Bias], Field(max_length=MAX_LOGIT_BIASES)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARACTERS)]
ChoiceText = Annotated[str, Field(min_length=1, max_length=structured.MAX_CHOICE_CHARACTERS)]
#: JSON Schema has no words for the size and the depth of an object; ``core.structured`` checks both.
_SCHEMA = {
    "type": "object",
    "description": "a JSON schema",
    "x-max-characters": structured.MAX_SCHEMA_CHARACTERS,
    "x-max-depth": structured.MAX_SCHEMA_DEPTH,
}
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
ModelName = Annotated[str, Field(min_length=1, max_length=MAX_MODEL_CHARACTERS)]
Priority = Annotated[
    int,
    Field(
        ge=int(PRIORITY.low),
        le=int(PRIORITY.high),
        description="the lower, the earlier: negative before 0, and positive behind",
    ),
]
MetadataKey = Annotated[str, Field(min_length=1, max_length=MAX_METADATA_KEY)]
MetadataValue = Annotated[str, Field(max_length=MAX_METADATA_VALUE)]
JobId = Annotated[str, Field(pattern=JOB_ID, max_length=128)]
Seconds = Annotated[float, Field(ge=0, le=MAX_HELD_SECONDS, allow_inf_nan=False)]


class Body(BaseModel):
    """A JSON object: no unknown names, no guessing of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class StructuredBody(Body):
    """The form the answer must have: exactly one of these."""

    model_config = ConfigDict(serialize_by_alias=True)

    schema_: Annotated[dict[str, Any], WithJsonSchema(_SCHEMA)] = Field(default_factory=dict, alias="json")
    json_object: Literal[True] = True
    regex: Annotated[str, Field(min_length=1, max_length=structured.MAX_REGEX_CHARACTERS)] = ""
    choice: Annotated[list[ChoiceText], Field(min_length=1, max_length=structured.MAX_CHOICES)] = Field(
        default_factory=list
    )
    grammar: Annotated[str, Field(min_length=1, max_length=structured.MAX_GRAMMAR_CHARACTERS)] = ""


class Params(Body):
    """How tokens are drawn, and when to stop."""

    max_tokens: Annotated[int, bounded("max_tokens")] = _DEFAULT.max_tokens
    n: Annotated[int, bounded("n")] = _DEFAULT.n
    temperature: Annotated[float, bounded("temperature")] = _DEFAULT.temperature
    top_p: Annotated[float, bounded("top_p")] = _DEFAULT.top_p
    top_k: Annotated[int, bounded("top_k")] = _DEFAULT.top_k
    min_p: Annotated[float, bounded("min_p")] = _DEFAULT.min_p
    seed: Annotated[int, bounded("seed")] | None = None
    stop: Stop = Field(default_factory=list)
    logprobs: Annotated[int, bounded("logprobs")] | None = None
    prompt_logprobs: Annotated[int, bounded("prompt_logprobs")] | None = None
    ignore_eos: bool = False
    presence_penalty: Annotated[float, bounded("presence_penalty")] = _DEFAULT.presence_penalty
    frequency_penalty: Annotated[float, bounded("frequency_penalty")] = _DEFAULT.frequency_penalty
    repetition_penalty: Annotated[float, bounded("repetition_penalty")] = _DEFAULT.repetition_penalty
    logit_bias: LogitBias = Field(default_factory=dict)
    min_tokens: Annotated[int, bounded("min_tokens")] = _DEFAULT.min_tokens
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] = Field(default_factory=list)
    structured_outputs: StructuredBody | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] = Field(default_factory=list)


class Turn(Body):
    """One message of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]


class GenerateInput(Body):
    """Exactly one of the three."""

    prompt: Prompt | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    prompt_token_ids: TokenIds | None = None


class PredictInput(Body):
    """The ids at whose positions the likeliest next id is wanted."""

    token_ids: TokenIds


class NoParams(Body):
    """Nothing is drawn, so nothing can be said about how."""


class WebhookBody(Body):
    """Whom to tell that the job has ended, whichever way."""

    url: Annotated[str, Field(min_length=1, max_length=MAX_URL_CHARACTERS)]
    events: Annotated[list[Literal["completed"]], Field(min_length=1, max_length=len(WEBHOOK_EVENTS))] = ["completed"]


class JobFields(Body):
    """What every kind of job may say."""

    model: ModelName | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = None
    priority: Priority = 0
    deadline_seconds: Annotated[float, Field(gt=0, le=MAX_SECONDS)] | None = None
    resume: Annotated[Resume, Field(strict=False)] = Resume.RESTART
    refuse_if_late: bool = False
    result_ttl_seconds: Annotated[int, Field(ge=1, le=MAX_SECONDS)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA)] = Field(default_factory=dict)
    webhook: WebhookBody | None = None

    def to_request(self) -> Request:
        """What the client asked, in the words of ``core``.

        Raises:
            RequestError: naming the field.
        """
        return Request.from_wire(self.model_dump(include=set(FIELDS), exclude_unset=True))

    def to_new_job(self, job_id: str, request: Request, *, result_ttl_seconds: int, awaited: bool) -> NewJob:
        """The job to submit; ``request`` is ours with the model's name settled.

        Raises:
            InvalidField: ``refuse_if_late`` without a deadline.
        """
        if self.refuse_if_late and self.deadline_seconds is None:
            raise InvalidField("refuse_if_late", "needs deadline_seconds beside it")
        return NewJob(
            id=job_id,
            request=request,
            deadline_seconds=self.deadline_seconds,
            resume=self.resume,
            refuse_if_late=self.refuse_if_late,
            result_ttl_seconds=self.result_ttl_seconds or result_ttl_seconds,
            metadata=self.metadata,
            webhook=self.webhook.url if self.webhook else None,
            awaited=awaited,
        )


class GenerateBody(JobFields):
    """Continue a prompt, a chat or token ids."""

    kind: Literal["generate"]
    input: GenerateInput
    params: Params | None = None


class PredictBody(JobFields):
    """The likeliest next token id at each position."""

    kind: Literal["predict"]
    input: PredictInput
    params: NoParams | None = None


class TextBody(Body):
    """``POST /predict``: text for a model with a tokenizer, token ids with spaces between for one without."""

    input_text: Prompt
    model: ModelName | None = None
    priority: Priority = 0


class RetryBody(Body):
    """Which dead letters to queue again; all where none is named."""

    ids: Annotated[list[JobId], Field(min_length=1, max_length=MAX_RETRIES)] | None = None


JobBody = Annotated[GenerateBody | PredictBody, Field(discriminator="kind")]
JOB_BODY: TypeAdapter[GenerateBody | PredictBody] = TypeAdapter(JobBody)
RETRY_BODY: TypeAdapter[RetryBody] = TypeAdapter(RetryBody)
TEXT_BODY: TypeAdapter[TextBody] = TypeAdapter(TextBody)


class Query(BaseModel):
    """A query string: no unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class WaitQuery(Query):
    """How long to wait for the job's end, in seconds."""

    wait: Seconds = 0.0


class PageQuery(Query):
    """A page of a list, newest first."""

    after: JobId | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 20


class ListQuery(PageQuery):
    """Which jobs, newest first."""

    status: Annotated[list[JobState], Field(max_length=16)] = Field(default_factory=list)
    kind: Annotated[list[Kind], Field(max_length=16)] = Field(default_factory=list)
    reason: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class EventsQuery(Query):
    """After which event to go on; the header ``Last-Event-ID`` says the same."""

    after: Annotated[int, Field(ge=-1, le=MAX_EVENT_NUMBER)] | None = None
    last_event_id: Annotated[int, Field(ge=-1, le=MAX_EVENT_NUMBER)] | None = None


#: The known names under each path, to suggest one of them for an unknown one.
Names: TypeAlias = Mapping[str, tuple[str, ...]]
JOB_NAMES: Names = {
    "": tuple(GenerateBody.model_fields),
    "params": tuple(Params.model_fields),
    "params.structured_outputs": structured.FORMS,
    "input": (*GenerateInput.model_fields, *PredictInput.model_fields),
    "input.messages": tuple(Turn.model_fields),
    "webhook": tuple(WebhookBody.model_fields),
}
TEXT_NAMES: Names = {"": tuple(TextBody.model_fields)}
RETRY_NAMES: Names = {"": tuple(RetryBody.model_fields)}
QUERY_NAMES: Names = {"": tuple({**WaitQuery.model_fields, **ListQuery.model_fields, **EventsQuery.model_fields})}
