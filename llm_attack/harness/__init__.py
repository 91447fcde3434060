"""The only part that imports lm-eval: model, tasks, gold labels, judge, and every patch.

Beyond the documented interface, it relies on these internals of lm-eval:

- `cache`: a `CacheHook` has `dbdict`, the file, or None without a file; keys hold only requests.
- `encode` of `requests`: `TemplateLM.loglikelihood` hands ((context, continuation), tokens, tokens)
  to `_loglikelihood_tokens`, and tokenises by `tokenizer.encode`.
- `gold`: `Task.process_results` judges (log-likelihood, is_greedy) pairs in the order of the
  choices; `acc_mutual_info` needs twice as many.
- `judge`: `simple_evaluate` asks for all answers of a type in one call, and its TaskManager by
  `load` (from 0.4.12 on) or `load_task_or_group`; an `Instance` keeps answers in `resps` and
  `filtered_resps`; `evaluator.add_env_info` and `evaluator.get_git_commit_hash` take inventory.
- `generation`: `HFLM.generate_until` calls `_model_generate` with prompts padded on the left, in
  the same order each time, reads `batch_size` from `batch_size_per_gpu`, and encodes prompts by
  `tok_batch_encode`.
- `texts`: a task has its filters in `_filters`; `process_results` of a text gives `bits_per_byte`
  or `byte_perplexity` as (log-likelihood, bytes).
- `model`: `HFLM` calls `_get_config` and `_create_tokenizer` as it loads, and
  `_loglikelihood_tokens` with None for the key of a window of a longer text; it has `backend`,
  `mixed_precision_dtype` and `softmax_dtype`.
- `arguments`: the signature of `HFLM.__init__` has all arguments of `hf`.
- `patches`: `Task.build_all_requests` leaves `instances`; `api.model` and `api.task` draw bars by a
  `tqdm` of their own; `utils.env` compiles templates; `TaskManager` takes `include_path`.
- `tasks`: `__main__.cli_evaluate` reads `sys.argv`, and its error begins with "Tasks not found".

Each release from 0.4.10 to 0.4.13 has all of these. The tests pass with 0.4.13. For 0.4.10, see
docs/limits.md. The sources of the others were only read.

0.5 is not supported, and pyproject.toml leaves it out. In 0.5.0.dev1 `utils.env` is gone, an
`Instance` needs `doc_id`, and a task of multiple choice is a class of its own, without
`multiple_input` and with other rules for `doc_to_text`.
"""
