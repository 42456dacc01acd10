"""What services tell about themselves: `tracing` and `rpc` for spans, `export` sends them, `logs` for lines.

| module     | imported by                  | imports OpenTelemetry                        |
|------------|------------------------------|----------------------------------------------|
| `tracing`  | whoever makes spans          | when `install` is called                     |
| `rpc`      | the gRPC server              | never                                        |
| `export`   | `process.run`, once          | its SDK, only where an endpoint is known     |
| `resource` | `export`, metrics            | its SDK                                      |
| `logs`     | `process.run`, whoever binds | structlog, only for JSON                     |
"""
