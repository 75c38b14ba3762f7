//! Names of the fields in spans and log events. `tracing` macros take literals: write them as here.
//!
//! `pod.id pod.name pod.namespace pod.uid container.id container.name image.ref image.digest exec.id
//! rpc monitor.pid pid path errno elapsed_ms attempt error`
