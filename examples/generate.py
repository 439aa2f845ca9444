"""Two prompts in one batch, then one answer as it is written."""

from foveal import LLM, SamplingParams

llm = LLM("smollm2")

greedy = SamplingParams(temperature=0.0, max_tokens=24)
for output in llm.generate(["The capital of France is", "Water boils at"], greedy):
    print(output.prompt + output.outputs[0].text)

written = 0
for output in llm.stream("Once upon a time", SamplingParams(temperature=0.8, seed=1, max_tokens=60)):
    text = output.outputs[0].text
    print(text[written:], end="", flush=True)
    written = len(text)
print()
