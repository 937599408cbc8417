"""Write after sources, or score targets, with a saved run: python tools/generate.py --load RUN --input IN --output OUT

A line of the input is {"source": "..."}, with "choices" or "target" under --mode score. Without --input, lines are read
from standard input. With torchrun the model is spread over the processes; what is written does not depend on that.
"""

import sys
from pathlib import Path

from megatron_metro.config.errors import exit_on_error
from megatron_metro.config.parser import Parser, number, whole_number
from megatron_metro.device import activate
from megatron_metro.inference.answering import answer_file, converse
from megatron_metro.inference.options import START_TOKENS, WritingOptions
from megatron_metro.inference.serving import open_answerer, read_options, read_saved_run
from megatron_metro.parallel.groups import initialise
from megatron_metro.training.loading import load_checkpoint

COUNT = {"type": whole_number(1), "metavar": "N"}


def _build_parser() -> Parser:
    parser, defaults = Parser(description=__doc__), WritingOptions()
    flag = parser.add_argument
    flag("--load", required=True, metavar="FOLDER", help="the --save folder of a run")
    flag("--ckpt-step", type=whole_number(0), metavar="N", help="step to load instead of the newest")
    flag("--input", type=Path, metavar="FILE", help="JSON lines")
    flag("--output", type=Path, metavar="FILE", help="JSON lines; an attempt that was cut short is gone on with")
    flag("--mode", choices=("write", "score"), default="write", help="write texts, or score given ones")
    flag("--decoding", choices=("greedy", "sample", "beam"), default=defaults.decoding, help="how tokens are chosen")
    flag("--max-new-tokens", **COUNT, default=defaults.max_new_tokens, help="longest text, its </s> included")
    flag("--temperature", type=number(1e-3, 1e3), metavar="X", default=defaults.temperature, help="sample: flatness")
    flag("--top-k", type=whole_number(0), metavar="N", default=defaults.top_k, help="sample: most likely N; 0 for all")
    flag("--top-p", type=number(1e-6, 1), metavar="X", default=defaults.top_p, help="sample: most likely share")
    flag("--seed", type=whole_number(0), metavar="N", default=defaults.seed, help="sample: with a line's number")
    flag("--num-beams", **COUNT, default=defaults.num_beams, help="beam: texts kept for each source")
    flag("--length-penalty", type=number(-10, 10), metavar="X", default=defaults.length_penalty, help="beam: alpha")
    flag("--length-penalty-form", choices=("gnmt", "hf"), default=defaults.length_penalty_form, help="beam: T5's, hf's")
    flag("--decoder-start", choices=START_TOKENS, help="first token read (default: T5's pad, METRO's eos)")
    flag("--batch-size", **COUNT, default=8, help="sources at once")
    flag("--tensor-model-parallel-size", **COUNT, default=1, help="processes that share each layer")
    flag("--pipeline-model-parallel-size", **COUNT, default=1, help="stages the layers are cut into")
    flag("--precision", choices=("fp32", "bf16"), default="fp32", help="of weights and activations")
    flag("--tokenizer-model", metavar="FILE", help="in place of the one that the run was trained with")
    flag("--device", choices=("auto", "cuda", "cpu"), default="auto", help="cuda where there is one")
    return parser


if __name__ == "__main__":
    with exit_on_error():
        flags = vars(_build_parser().read(sys.argv[1:]))
        run, options = read_saved_run(flags), read_options(flags)
        device = activate(flags["device"])
        answerer = open_answerer(run, initialise(run.parallel, device), device, flags, options, load_checkpoint)
        if flags["input"] is None:
            converse(answerer, sys.stdin, sys.stdout)
        else:
            answer_file(answerer, run, flags["input"], flags["output"], flags["batch_size"])
