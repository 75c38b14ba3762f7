//! The one place that turns errors into gRPC codes.
//!
//! Messages carry the whole chain of causes: kubelet shows them to users as they are. kubelet's client
//! keeps a message unchanged only under code Unknown (it puts `rpc error: ...` before any other), and
//! looks for some words at its very start: those errors go out as Unknown.

use tonic::{Code, Status};

use crate::base::error::{HasKind, Kind, chain};

/// First words of a pull error by which kubelet tells the reason: those of cri-api's errors package.
const PULL_REASONS: [&str; 2] = ["RegistryUnavailable", "SignatureValidationFailed"];

/// Longest message in bytes. It travels percent-encoded in a header, where clients have limits.
const MAX_TEXT: usize = 4096;

/// The code of a kind.
fn code(kind: Kind) -> Code {
    match kind {
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::ResourceExhausted => Code::ResourceExhausted,
        Kind::Unavailable => Code::Unavailable,
        Kind::DeadlineExceeded => Code::DeadlineExceeded,
        Kind::Cancelled => Code::Cancelled,
        Kind::PermissionDenied => Code::PermissionDenied,
        Kind::Unimplemented => Code::Unimplemented,
        Kind::Internal => Code::Internal,
    }
}

/// The status of a failed verb.
pub(super) fn of<E: HasKind>(error: &E) -> Status {
    Status::new(code(error.kind()), bounded(chain(error)))
}

/// The status of a failed pull: where the registry cannot be had, in the words kubelet looks for.
pub(super) fn of_pull<E: HasKind>(error: &E) -> Status {
    let text = chain(error);
    for reason in PULL_REASONS {
        // Wherever the images' part put it: kubelet looks at the very start.
        if text.contains(reason) {
            let rest = text.replace(&format!("{reason}: "), "");
            return Status::unknown(bounded(format!("{reason}: {rest}")));
        }
    }
    if error.kind() == Kind::Unavailable {
        return Status::unknown(bounded(format!("{}: {text}", PULL_REASONS[0])));
    }
    of(error)
}

/// A handler panicked.
pub(super) fn panicked() -> Status {
    Status::internal("the request failed by a fault in berth (a panic); the daemon's log has it")
}

/// A call of the interface that is not built yet.
pub(super) fn unbuilt(rpc: &str, why: &str) -> Status {
    Status::unimplemented(format!(
        "{rpc} is not built in this version of berth: {why}"
    ))
}

/// Cuts a text that is too long, and says so.
fn bounded(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        let mut end = MAX_TEXT;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Plain {
        text: String,
        kind: Kind,
    }

    impl HasKind for Plain {
        fn kind(&self) -> Kind {
            self.kind
        }
    }

    fn plain(text: &str, kind: Kind) -> Plain {
        Plain {
            text: text.to_owned(),
            kind,
        }
    }

    #[test]
    fn kubelet_finds_its_words_at_the_start() {
        let status = of_pull(&plain(
            "connect to reg.test: connection refused",
            Kind::Unavailable,
        ));
        assert_eq!(status.code(), Code::Unknown);
        assert_eq!(
            status.message(),
            "RegistryUnavailable: connect to reg.test: connection refused"
        );
        let status = of_pull(&plain(
            "SignatureValidationFailed: no",
            Kind::PermissionDenied,
        ));
        assert_eq!(status.code(), Code::Unknown);
        assert_eq!(status.message(), "SignatureValidationFailed: no");
        let status = of_pull(&plain(
            "pull \"x\": RegistryUnavailable: refused",
            Kind::Unavailable,
        ));
        assert_eq!(status.message(), "RegistryUnavailable: pull \"x\": refused");
        let status = of_pull(&plain("no such manifest", Kind::NotFound));
        assert_eq!(status.code(), Code::NotFound);
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        let text = of(&plain(&"ä".repeat(5000), Kind::Internal))
            .message()
            .to_owned();
        assert!(
            text.len() <= MAX_TEXT + '…'.len_utf8() && text.ends_with('…'),
            "{}",
            text.len()
        );
    }
}
