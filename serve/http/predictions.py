"""POST /predict/NAME: tensors in, tensors out."""

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from models.model import Batch, Input
from serve.http import tensors
from serve.http.errors import APIError, translate
from serve.predict import Predicts
from serve.worker import Busy, Failed

MOST_NUMBERS = 2**22  # of an answer in lists, which are written in a second or so


class Prediction(BaseModel):
    """A request body of POST /predict/NAME. inputs: by name, as the model's entry under /v1/models tells.

    outputs: those that are wanted, null for all. encoding: of the outputs.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: dict[str, tensors.Encoded | Annotated[list[Any], Field(description="nested lists of numbers")]] = Field(
        min_length=1
    )
    outputs: list[str] | None = None
    encoding: Literal["list", "base64"] = "list"


class Predicted(BaseModel):
    """The answer: outputs by name, each with a row for each row of the inputs."""

    model: str
    outputs: dict[str, tensors.Encoded | list[Any]]


def routes(predictors: Mapping[str, Predicts], responses: dict[int | str, dict[str, Any]] | None = None) -> APIRouter:
    """predictors: by name; what is in it when a request comes counts. responses: errors, for the OpenAPI schema."""
    router = APIRouter()

    @router.post("/predict/{name:path}", response_model=Predicted, responses=responses)
    async def predict(name: str, body: Prediction) -> Response:
        predictor = predictors.get(name)
        if predictor is None:
            known = ", ".join(map(repr, predictors)) or "none"
            raise APIError(404, f"no model {name!r} predicts here; there are {known}", "model", "model_not_found")
        try:
            inputs = await asyncio.to_thread(_read, body, predictor.takes)
            outputs = await predictor.predict(inputs)
            answer = await asyncio.to_thread(_write, name, body, outputs)
        except ValueError as error:
            raise APIError(400, str(error), "inputs") from None
        except (Busy, Failed) as error:
            raise translate(error) from error
        return Response(answer, media_type="application/json")

    return router


def card(name: str, predictor: Predicts) -> dict[str, Any]:
    """Its entry in the list of models."""
    place = {"predict": f"/predict/{name}", "inputs": tensors.describe(dict(predictor.takes))}
    return {"id": name, "object": "model", "created": predictor.created, "owned_by": "edifice", **place}


def _read(body: Prediction, takes: Mapping[str, Input]) -> Batch:
    unknown = [name for name in body.inputs if name not in takes]
    missing = [name for name, wanted in takes.items() if name not in body.inputs and not wanted.optional]
    if unknown or missing:
        wrong = f"{unknown[0]!r} is not known" if unknown else f"{missing[0]!r} is missing"
        raise ValueError(f"inputs: {wrong}; the model takes {', '.join(takes)}")
    inputs = {name: tensors.read(name, given, takes[name]) for name, given in body.inputs.items()}
    tensors.together(inputs, takes)
    return inputs


def _write(name: str, body: Prediction, outputs: Batch) -> bytes:
    wanted = list(outputs) if body.outputs is None else body.outputs
    unknown = [each for each in wanted if each not in outputs]
    if unknown:
        raise ValueError(f"outputs: {unknown[0]!r} is not known; the model has {', '.join(outputs)}")
    count = sum(outputs[each].numel() for each in wanted)
    if body.encoding == "list" and count > MOST_NUMBERS:
        raise ValueError(f"inputs: the answer has {count} numbers, more than {MOST_NUMBERS}; ask for base64 or less")
    answer = {"model": name, "outputs": {each: tensors.write(outputs[each], body.encoding) for each in wanted}}
    return json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()
