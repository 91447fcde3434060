"""The definitions as naive code: one request or question at a time.

Embeddings go in as `inputs_embeds`, and all logits are computed. There is no hook, no packing, and
nothing but the keyed draws in common with the code under test. The dtype is float64, because in
float32 the gradient of log-softmax is rounding error if the model is sure, and its sign decides.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from versions import dtype_of

from llm_attack.attacks import keys_for, signs
from llm_attack.demo import MODEL_PATH


class Reference:
    def __init__(self, path, dtype=torch.float64):
        path = MODEL_PATH if path == "demo" else path
        self.model = AutoModelForCausalLM.from_pretrained(path, **dtype_of(dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def tokens(self, context, continuation):
        """Tokens, and how many are the continuation's, as lm-eval splits them."""
        kept = context.rstrip()
        whole = self.tokenizer.encode(context + continuation)
        n = len(self.tokenizer.encode(kept))
        return whole, len(whole) - n

    def embed(self, tokens):
        return self.model.get_input_embeddings()(torch.tensor(tokens)).detach()

    def log_probs(self, x, tokens):
        """Log-probability of each token but the first; x embeds all but the last."""
        logits = self.model(inputs_embeds=x[None]).logits[0].log_softmax(-1)
        return logits[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]

    def iterate(self, loss, x, epsilon, steps, step, norm="linf", decay=None):
        """Steps on loss(x), x (tokens, hidden) of one example, drawn back into the ball.

        norm: "l2" of all, or "l2_token" of each token; decay: of a momentum.
        """
        dim = {"linf": None, "l2": (0, 1), "l2_token": 1}[norm]
        clean, velocity = x.clone(), torch.zeros_like(x)
        for _ in range(steps):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(loss(x), x)
            if decay is not None:
                slope = velocity = decay * velocity + slope / slope.abs().sum()
            if dim is None:
                x = (x + step * slope.sign()).clamp(clean - epsilon, clean + epsilon)
                continue
            change = x - clean + step * slope / slope.norm(dim=dim, keepdim=True)
            length = change.norm(dim=dim, keepdim=True)
            x = clean + change * (epsilon / length).clamp(max=1)
        return x.detach()

    def alone(
        self, request, *, epsilon=0.01, steps=1, step=None, continuation=False, draw=None, **ball
    ):
        """Log-likelihood of one (context, continuation) that is attacked alone."""
        tokens, n = self.tokens(*request)
        x = self.embed(tokens[:-1])
        step = epsilon if step is None else step
        if draw is not None:
            key = torch.tensor([keys_for(draw, tokens)])
            x = x + epsilon * signs(key, x[None])[0]
        else:

            def loss(x):
                log_probs = self.log_probs(x, tokens)
                return -(log_probs[-n:] if continuation else log_probs).sum()

            x = self.iterate(loss, x, epsilon, steps, step, **ball)
        return float(self.log_probs(x, tokens)[-n:].sum().detach())

    def together(self, requests, loss, *, epsilon=0.01, steps=1, step=None, **ball):
        """Log-likelihoods of a question's requests; equal prefixes share their perturbation.

        loss(log-likelihoods, sequence losses) is what the attack ascends.
        """
        split = [self.tokens(*r) for r in requests]
        prefixes = sorted({tuple(t[: i + 1]) for t, _ in split for i in range(len(t) - 1)})
        index = {prefix: i for i, prefix in enumerate(prefixes)}
        x = torch.stack([self.embed([prefix[-1]])[0] for prefix in prefixes])

        def scores(nodes):
            of_continuation, of_sequence = [], []
            for tokens, n in split:
                rows = nodes[[index[tuple(tokens[: i + 1])] for i in range(len(tokens) - 1)]]
                log_probs = self.log_probs(rows, tokens)
                of_continuation.append(log_probs[-n:].sum())
                of_sequence.append(-log_probs.sum())
            return torch.stack(of_continuation), torch.stack(of_sequence)

        step = epsilon if step is None else step
        x = self.iterate(lambda x: loss(*scores(x)), x, epsilon, steps, step, **ball)
        return scores(x)[0].tolist()
