"""The model, the data and the training. Edit llama_pretrain_config.py, or override its values:

    torchrun --nproc-per-node 8 main.py data_config.seqlen=4096 train_config.seed=1

A line with ON_GPU has two values: one for GPUs, and one that a laptop trains in a minute. The GPU
values suit a node of 8 GPUs, and also train on one GPU of 80 GB. `python main.py --plan` estimates
their memory and speed without a GPU.
"""

import sys

import torch

ON_GPU = torch.cuda.is_available() or "--plan" in sys.argv

data_config = dict(
    source="python-stdlib",  # or `random`, a prepared folder, text files, .bin files
    random_document_length=0,  # tokens per document of `random`; 0: one document per row
    skip_undecodable=False,  # skip files that are not UTF-8, instead of an error
    end_of_text_id=50256,  # between documents in .bin files: GPT-2's; 128000 in llm.c's for Llama 3
    validation_fraction=0.0,  # share of the documents held out for evaluation
    validation_source="",  # or a separate corpus for evaluation, named as in source
    seqlen=8192 if ON_GPU else 512,  # tokens per row
    batch_size=8 if ON_GPU else 4,  # rows per step, over all ranks
    seed=42,  # order of the data
)

model_config = dict(
    preset="llama-1b" if ON_GPU else "tiny",  # tiny, llama-1b, llama-3b or llama-8b
    init_from="",  # a Hugging Face folder: its weights and its config.json, instead of the preset
    check_tokenizer=True,  # refuse data with other tokens than those of init_from
    overrides={},  # fields that replace the preset's, such as {"num_hidden_layers": 2}
)

train_config = dict(
    train_iters=1000 if ON_GPU else 150,  # steps in the whole run
    gradient_accumulation_steps=1,  # micro-batches per step; a rank splits its rows
    dtype="bfloat16" if ON_GPU else "float32",  # compute dtype; weights and optimizer are float32
    activation_checkpointing="full" if ON_GPU else "none",  # none, selective or full
    activation_offload=False,  # move what recomputing layers keep to host memory
    compile=ON_GPU,  # torch.compile; the first step takes longer
    eval_interval=0,  # steps between evaluations, with one after the last step; 0: none
    eval_iters=20,  # batches per evaluation, the same ones each time
    seed=42,  # initial weights
    output_dir="runs/llama" if ON_GPU else "runs/tiny",  # config, metrics, checkpoints, TensorBoard
    resume="auto",  # newest checkpoint in output_dir; `never`; or the path of a run or checkpoint
    continue_from="",  # a run or checkpoint: a new run begins with its weights and optimizer state
    checkpoint_interval=250 if ON_GPU else 50,  # steps between checkpoints; 0: only after the last
    keep_last=2,  # newest checkpoints to keep; 0: all
    on_checkpoint_failure="continue",  # or `stop`: after a failed save, such as on a full disk
    step_timeout=1800.0,  # seconds; a step that takes longer ends the run
    log_interval=1,  # steps between lines of the log; metrics.jsonl has every step
    wandb_project="",  # a project of Weights & Biases, to log there too; needs `pip install wandb`
    profile_steps=(),  # first and last step of a trace for Perfetto, such as (5, 8)
    optimizer_config=dict(
        learning_rate=3e-4 if ON_GPU else 2e-3,  # after the warm-up
        min_learning_rate_ratio=0.1,  # of learning_rate, at the end of the cosine decay
        warmup_iters=50 if ON_GPU else 10,  # steps of linear warm-up
        weight_decay=0.1,  # on matrices, not on norms
        betas=(0.9, 0.95),  # AdamW
        eps=1e-8,  # AdamW
        max_clip_grad_norm=1.0,  # a larger gradient norm is scaled down to this; inf: never
    ),
)

parallel_config = dict(
    context_parallel_size=2,  # cp: ranks that share a sequence; dp is world size / cp
    context_parallel_backend="auto",  # or `magi_attention`, `native`
    data_parallel_replicate_size=1,  # copies of the sharded weights (HSDP), such as one per node
)
