"""What the help of each prompt suite says; the suites themselves are in `benchmarks.suites`."""

# Prompt suites: name -> what its help says, and an example of what follows the name.
SUITES = {
    "geneval": ("GenEval: 553 prompts, six tasks, four images each.", "tiny-sd3 --reward geneval-hf --out out"),
    "hpsv2": (
        "The HPSv2 benchmark: four styles of 800 prompts.",
        "tiny-sd3 --prompts FOLDER --reward hpsv2.1 --out out",
    ),
    "t2i-compbench": (
        "T2I-CompBench: eight categories of 300 prompts, ten images each.",
        "tiny-sd3 --prompts FOLDER --reward clip-cosine --out out",
    ),
    "unigenbench": (
        "UniGenBench: 600 prompts, test points of ten dimensions.",
        "tiny-sd3 --prompts test_prompts_en.csv --reward '{unigenbench: {endpoint: URL, model: NAME}}' --out out",
    ),
    "parti": ("PartiPrompts: 1,632 prompts of twelve categories.", "tiny-sd3 --prompts PartiPrompts.tsv --reward clip"),
    "drawbench": ("DrawBench: 200 prompts.", "tiny-sd3 --prompts drawbench.csv --reward pickscore --out out"),
    "prompts": ("Any prompts with any scorer.", "tiny-sd3 --prompts shapes:test --reward shapes --limit 60 --out out"),
}
