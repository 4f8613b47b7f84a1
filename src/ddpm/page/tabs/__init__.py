"""The tabs of the page. Each module defines `routes(state)`; its script in `static/` has the same name."""
