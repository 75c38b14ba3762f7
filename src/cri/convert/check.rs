//! The checks that fields share, and the error they end in.

use tonic::Status;

/// A field that cannot be honoured.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::cri) enum Invalid {
    /// The value is wrong.
    #[error("{field}: {value} {problem}: {mend}")]
    Value {
        /// Path of the field in the request.
        field: String,
        /// What was given, quoted and cut.
        value: String,
        /// What is wrong with it.
        problem: &'static str,
        /// What to give instead.
        mend: &'static str,
    },
    /// Something is not there.
    #[error("{field} is missing: {mend}")]
    Missing {
        /// Path of the field in the request.
        field: String,
        /// What to give.
        mend: &'static str,
    },
}

/// Outcome of a conversion.
pub(in crate::cri) type Checked<T> = Result<T, Invalid>;

impl From<Invalid> for Status {
    fn from(error: Invalid) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

/// Longest value shown in a message, in characters.
const SHOWN: usize = 120;

/// An [`Invalid::Value`]; the value is printed as `Debug` has it and cut.
pub(in crate::cri) fn invalid(
    field: impl Into<String>,
    value: &dyn std::fmt::Debug,
    problem: &'static str,
    mend: &'static str,
) -> Invalid {
    let text = format!("{value:?}");
    let mut shown: String = text.chars().take(SHOWN).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    Invalid::Value {
        field: field.into(),
        value: shown,
        problem,
        mend,
    }
}

/// An [`Invalid::Missing`].
pub(in crate::cri) fn missing(field: impl Into<String>, mend: &'static str) -> Invalid {
    Invalid::Missing {
        field: field.into(),
        mend,
    }
}

/// Text without NUL and other control characters.
pub(super) fn printable(field: &str, text: &str) -> Checked<()> {
    if text.chars().any(char::is_control) {
        return Err(invalid(
            field,
            &text,
            "has a control character",
            "leave it out",
        ));
    }
    Ok(())
}

/// Text that becomes a C string.
pub(super) fn no_nul(field: &str, text: &str) -> Checked<()> {
    if text.contains('\0') {
        return Err(invalid(field, &text, "has a NUL character", "leave it out"));
    }
    Ok(())
}

/// A name that may become part of a path: not empty, no slash, at most 253 bytes.
pub(super) fn name(field: &str, text: &str) -> Checked<()> {
    if text.is_empty() {
        return Err(missing(field, "give a name"));
    }
    printable(field, text)?;
    if text.contains('/') || text == "." || text == ".." {
        return Err(invalid(
            field,
            &text,
            "is not a name",
            "use no slash, nor `.` or `..` alone",
        ));
    }
    if text.len() > 253 {
        return Err(invalid(
            field,
            &text,
            "is too long",
            "use at most 253 bytes",
        ));
    }
    Ok(())
}

/// Does a path have a component `..`?
pub(super) fn climbs(path: &str) -> bool {
    path.split('/').any(|part| part == "..")
}

/// An absolute path without control characters and `..`.
pub(super) fn absolute(field: &str, path: &str) -> Checked<()> {
    printable(field, path)?;
    if !path.starts_with('/') {
        return Err(invalid(
            field,
            &path,
            "is not absolute",
            "start it with `/`",
        ));
    }
    if climbs(path) {
        return Err(invalid(
            field,
            &path,
            "has a `..`",
            "write the path without it",
        ));
    }
    if path.len() > 4095 {
        return Err(invalid(
            field,
            &path,
            "is too long",
            "use at most 4095 bytes",
        ));
    }
    Ok(())
}

/// An id that must be there, for calls on one object.
pub(in crate::cri) fn id(field: &str, text: &str) -> Checked<()> {
    if text.is_empty() {
        return Err(missing(field, "give the id"));
    }
    printable(field, text)
}

/// A known value of an enum.
pub(super) fn known<E: TryFrom<i32>>(field: &str, value: i32) -> Checked<E> {
    E::try_from(value).map_err(|_unknown| {
        invalid(
            field,
            &value,
            "is not a value of the enum",
            "use one of CRI v1",
        )
    })
}

/// A number in a range.
pub(super) fn within(
    field: &str,
    value: i64,
    range: std::ops::RangeInclusive<i64>,
    mend: &'static str,
) -> Checked<()> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(invalid(field, &value, "is out of range", mend))
}

/// A command to run: at least one word, none with NUL.
pub(in crate::cri) fn command(field: &str, words: &[String]) -> Checked<()> {
    if words.first().is_none_or(String::is_empty) {
        return Err(missing(field, "give a program and its arguments"));
    }
    for (n, word) in words.iter().enumerate() {
        no_nul(&format!("{field}[{n}]"), word)?;
    }
    Ok(())
}
