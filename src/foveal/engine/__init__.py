"""The engine: many requests at a time through one model and one paged cache."""

from foveal.engine.engine import Engine
from foveal.engine.guidance import Guidance
from foveal.engine.llm import LLM
from foveal.engine.outputs import CompletionOutput, Logprob, RequestOutput
from foveal.engine.params import SamplingParams
from foveal.engine.request import Request

__all__ = ["LLM", "CompletionOutput", "Engine", "Guidance", "Logprob", "Request", "RequestOutput", "SamplingParams"]
