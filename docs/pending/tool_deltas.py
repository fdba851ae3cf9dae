"""Which of vLLM's tool parsers lose a streamed call where several tokens come in one delta.

    python tool_deltas.py TOKENIZER

Feeds each parser, as vLLM's chat server does, a call that it reads whole, in deltas of 1 to 17 tokens, with every length of
the first delta. Prints, per parser and size, in how many of the ways to cut it the streamed call is the whole one.
"""
import json, logging, sys
import transformers
logging.disable(logging.CRITICAL)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.parser_manager import ParserManager

SHORT = {"city": "Paris"}
LONG = {"city": "Paris", "days": 3, "note": "with an umbrella, a warm coat and the good shoes; the rest is at the hotel", "units": "metric"}
def tool():
    return {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "note": {"type": "string"}, "units": {"type": "string"}}}}}
def js(args, key="arguments"): return json.dumps({"name": "get_weather", key: args})
def py(args): return "[get_weather(" + ", ".join(f"{k}={v!r}" for k, v in args.items()) + ")]"
def xml(args): return "<tool_call>\n<function=get_weather>\n" + "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in args.items()) + "</function>\n</tool_call>"
FORMATS = {
    "llama3_json": lambda a: js(a, "parameters"),
    "llama4_json": lambda a: js(a, "parameters"),
    "hermes": lambda a: f"<tool_call>\n{js(a)}\n</tool_call>",
    "qwen3_json": lambda a: f"<tool_call>\n{js(a)}\n</tool_call>",
    "qwen3_coder": xml, "qwen3_xml": xml,
    "mistral": lambda a: f"[TOOL_CALLS] [{js(a)}]",
    "pythonic": py, "llama4_pythonic": py,
    "olmo3": lambda a: "<function_calls>" + py(a)[1:-1] + "</function_calls>",
    "granite": lambda a: f"<|tool_call|>[{js(a)}]",
    "granite4": lambda a: f"<tool_call>\n{js(a)}\n</tool_call>",
    "granite-20b-fc": lambda a: f"<function_call> {js(a)}",
    "internlm": lambda a: f"<|action_start|><|plugin|>{js(a, 'parameters')}<|action_end|>",
    "jamba": lambda a: f"<tool_calls>[{js(a)}]</tool_calls>",
    "phi4_mini_json": lambda a: f"functools[{js(a)}]",
    "xlam": lambda a: f"[{js(a)}]",
    "hunyuan_a13b": lambda a: f"<tool_calls>[{js(a)}]</tool_calls>",
    "deepseek_v3": lambda a: "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n" + json.dumps(a) + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": lambda a: "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>" + json.dumps(a) + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi_k2": lambda a: "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>" + json.dumps(a) + "<|tool_call_end|><|tool_calls_section_end|>",
    "glm45": lambda a: "<tool_call>get_weather\n" + "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in a.items()) + "</tool_call>",
    "glm47": lambda a: "<tool_call>get_weather" + "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in a.items()) + "</tool_call>",
    "minimax_m2": lambda a: '<minimax:tool_call>\n<invoke name="get_weather">\n' + "".join(f'<parameter name="{k}">{v}</parameter>\n' for k, v in a.items()) + "</invoke>\n</minimax:tool_call>",
    "ernie45": lambda a: f"<tool_call>\n{js(a)}\n</tool_call>",
    "seed_oss": lambda a: "<seed:tool_call><function=get_weather>" + "".join(f"<parameter={k}>{v}</parameter>" for k, v in a.items()) + "</function></seed:tool_call>",
    "longcat": lambda a: f"<longcat_tool_call>\n{js(a)}\n</longcat_tool_call>",
    "step3p5": xml,
    "mimo": xml,
    "gigachat3": lambda a: f"<|function_call|>{js(a)}",
}
SPECIAL = ["<|python_tag|>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|tool_call|>", "<function_call>", "<|action_start|>", "<|plugin|>", "<|action_end|>",
    "<tool_calls>", "</tool_calls>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<minimax:tool_call>", "</minimax:tool_call>", "<seed:tool_call>", "</seed:tool_call>",
    "<longcat_tool_call>", "</longcat_tool_call>", "<|function_call|>", "<think>", "</think>", "<response>", "</response>", "<function_calls>", "</function_calls>", "<seed:think>", "</seed:think>"]
SIZES = (1, 2, 3, 6, 9, 17)
JOIN = {"llama3_json": "; ", "llama4_json": "; "}
BRACKETED = ("mistral", "pythonic", "llama4_pythonic", "granite", "jamba", "phi4_mini_json", "xlam", "hunyuan_a13b", "deepseek_v3", "deepseek_v31", "kimi_k2", "olmo3")
def two(name, form):
    if name in ("pythonic", "llama4_pythonic"): return form(SHORT)[:-1] + ", " + form({"city": "Rome"})[1:]
    if name in ("mistral","granite","phi4_mini_json","xlam"):
        a, b = form(SHORT), form({"city": "Rome"}); return a[:-1] + ", " + b[b.index("[{") + 1:]
    if name in ("jamba","hunyuan_a13b"): return f"<tool_calls>[{js(SHORT)}, {js({'city': 'Rome'})}]</tool_calls>"
    if name == "olmo3": return "<function_calls>" + py(SHORT)[1:-1] + "\n" + py({"city": "Rome"})[1:-1] + "</function_calls>"
    if name.startswith("deepseek"): return form(SHORT).replace("<｜tool▁calls▁end｜>", "") + ("\n" if name == "deepseek_v3" else "") + form({"city": "Rome"}).replace("<｜tool▁calls▁begin｜>", "")
    if name == "kimi_k2": return form(SHORT).replace("<|tool_calls_section_end|>", "") + form({"city": "Rome"}).replace("<|tool_calls_section_begin|>", "").replace(":0", ":1")
    return form(SHORT) + JOIN.get(name, "\n") + form({"city": "Rome"})

def request():
    return ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], model="m", tools=[tool()], tool_choice="auto", stream=True)

def streamed(cls, tokenizer, ids, first, size):
    req = request()
    parser = cls(tokenizer, req.tools)
    cuts = [0, *range(first, len(ids), size), len(ids)]
    before, calls, content = "", {}, ""
    for a, b in zip(cuts, cuts[1:]):
        text = tokenizer.decode(ids[:b], skip_special_tokens=True)
        delta = parser.parse_delta(text[len(before):], ids[a:b], req, prompt_token_ids=[1], finished=b == len(ids))
        before = text
        for call in (delta.tool_calls if delta else ()) or ():
            one = calls.setdefault(call.index, ["", ""])
            if call.function:
                one[0] += call.function.name or ""; one[1] += call.function.arguments or ""
    return list(calls.values())

def judged(calls, want):
    try: return [(n, json.loads(a)) for n, a in calls] == want
    except ValueError: return False

tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.add_tokens(SPECIAL, special_tokens=False)
print("parser | call | tokens |", " | ".join(map(str, SIZES)))
for name, form in FORMATS.items():
    for length, text, count in (("short", form(SHORT), 1), ("long", form(LONG), 1), ("two", two(name, form), 2)):
        ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        try:
            cls = ParserManager.get_parser(tool_parser_name=name, enable_auto_tools=True, tokenizer=tokenizer)
            whole = cls(tokenizer, request().tools).parse(text, request(), enable_auto_tools=True, model_output_token_ids=ids)[2]
            want = [(c.name, json.loads(c.arguments)) for c in whole or ()]
        except Exception as e:
            print(name, length, "CAN'T", type(e).__name__, str(e)[:150]); break
        if len(want) != count:
            print(name, length, "not read whole", len(want)); continue
        row = []
        for size in SIZES:
            good = 0
            for first in range(1, size + 1):
                try: good += judged(streamed(cls, tokenizer, ids, first, size), want)
                except Exception as e: pass
            row.append(f"{good}/{size}")
        print(name, "|", length, "|", len(ids), "|", " | ".join(row), flush=True)
