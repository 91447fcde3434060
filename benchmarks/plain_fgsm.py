"""FGSM as a user of transformers writes it. The default attack has to be faster.

Each request is attacked by itself: one step along the sign of the gradient of its negative
log-likelihood, with respect to its embeddings. Batches have eight requests, sorted by length, so
there is almost no padding.
"""

import torch


def answers(model, requests, epsilon, batch_size=8, step=None):
    """(log-likelihood, is_greedy) of the continuation of each request under attack.

    Args:
        model: a causal LM of transformers.
        requests: (tokens, number of continuation tokens, which come last) for each request.
        epsilon: absolute amplitude.
        batch_size: requests per batch.
        step: maps clean embeddings, their targets, and a mask of those that are not padding to
            attacked embeddings; None: the step in this file.
    """
    found = [None] * len(requests)
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        rows = [torch.tensor(requests[i][0]) for i in part]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        length = torch.tensor([len(row) for row in rows])
        inputs, target = tokens[:, :-1], tokens[:, 1:]
        real = torch.arange(target.shape[1]) < length[:, None] - 1
        continuation = torch.tensor([requests[i][1] for i in part])
        scored = real & (torch.arange(target.shape[1]) >= (length - 1 - continuation)[:, None])
        x = model.get_input_embeddings()(inputs).detach()
        if step is None:
            x.requires_grad_(True)
            log_prob = model(inputs_embeds=x).logits.log_softmax(-1)
            loss = -(log_prob.gather(-1, target[..., None])[..., 0] * real).sum()
            (gradient,) = torch.autograd.grad(loss, x)
            del log_prob, loss
            attacked = x.detach() + epsilon * gradient.sign() * real[..., None]
        else:
            attacked = step(x, target, real)
        with torch.no_grad():
            log_prob = model(inputs_embeds=attacked).logits.log_softmax(-1)
        values = (log_prob.gather(-1, target[..., None])[..., 0] * scored).sum(-1)
        greedy = ((log_prob.argmax(-1) == target) | ~scored).all(-1)
        for i, value, is_greedy in zip(part, values.tolist(), greedy.tolist(), strict=True):
            found[i] = value, is_greedy
    return found
