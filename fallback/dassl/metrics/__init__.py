def compute_accuracy(output, target, topk=(1,)) -> list:
    """Return the top-k accuracies in percent, tensors (1,), of scores (B, C) or of a tuple that begins with them."""
    scores = output[0] if isinstance(output, (tuple, list)) else output
    ranked = scores.topk(max(topk), dim=1).indices  # (B, max k), best first
    hits = (ranked == target.view(-1, 1)).float().sum(dim=0).cumsum(dim=0)  # [k - 1]: labels among the k best
    return [hits[k - 1 : k] * (100.0 / target.shape[0]) for k in topk]
