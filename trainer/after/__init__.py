"""After pretraining: instruction tuning, a classification head, preference tuning; each with or without LoRA.

Each script is a run of its own kind, with a config.json of its own, and writes what the pretraining loop writes
(metrics.jsonl, status.json, checkpoints/, evaluations.json), with its exit codes, so whoever runs the one can run the others:

    torchrun --nproc-per-node N -m trainer.after.finetune --config config.json --out DIR [--resume]

`base` in the configuration is a checkpoint of ours or a GPT-2-shaped Hugging Face folder. Examples are JSON lines of token
numbers, because the node has no tokenizer; `orchestrator.models.tuning` makes them from text.
"""
