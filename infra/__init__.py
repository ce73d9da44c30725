"""What any trainer needs, one thing a file. Nothing here imports from the root.

A run
    flags            command-line flags, and files of flags (@FILE)
    ranks            the processes of a run: joining, leaving, gathering, printing once
    run_folder       what a run leaves behind, and resuming it
    checkpoints      checkpoints that survive a kill or a full disk at any moment
    fsdp             shards weights, gradients and optimizer state across ranks (FSDP2)
    track            the log in wandb, trackio or tensorboard too
    clock            where the time of a step goes
    memory           how much memory a device has
    files            files that are complete or absent, logs, locks, digests
    errors           errors of the user's data, which end a run with one line
Models
    families         what differs between Qwen2-VL, Qwen2.5-VL and Qwen3-VL
    model_folder     a Hugging Face model folder: checkpoints, weights, fingerprint, tokenizer
    flash            flash attention over blocks of the attention matrix, merged exactly
    embedding_cache  visual embeddings on disk
Media and records
    frames           which frames of a video are shown, and at what size
    patches          frames to patches, as the vision tower takes them
    reader           decodes images and videos
    video            runs the reader in a process that can be killed
    records          reads .json and .jsonl files of records
Answers
    answer_text      what an answer says: an option's letter, a number, or words
    options          the options of a multiple-choice question and their letters
    answers          a folder of an evaluation's answers, one line per question
    summary          from scores to a table, with intervals
    rouge            word error rate and ROUGE
    judge            a model that grades free-form answers, over HTTP
    reward_file      rewards of one's own: functions in a file
    stem             the Porter stemmer, for ROUGE
"""
