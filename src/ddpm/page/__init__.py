"""The page of `ddpm page`: a server of this machine, and what it sends to a browser. It is a leaf; the extra is `page`.

`server` answers requests, `work` makes one model call at a time, and `state` holds models and pictures. Each file of
`tabs` is a tab: it turns a request into a call of the library. `static/` holds the page itself.
"""
