"""Images, videos and sounds on their way through models: who looks at what, and what it costs."""
