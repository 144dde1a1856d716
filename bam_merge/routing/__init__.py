"""Which expert takes which token of a text: the routers of a mixture, looked at while it reads."""
