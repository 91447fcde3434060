"""Questions about one run or many: models, revisions, claims, hookpoints."""
