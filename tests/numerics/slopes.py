"""One directional derivative, as tests ask for it."""


def slope(client, batch, seed, epsilon, gradient):
    """<gradient, h+ - h-> / (2 epsilon) of one seed."""
    (projection,) = client.projections(batch, [seed], epsilon, gradient)
    return float(projection.rows.sum())
