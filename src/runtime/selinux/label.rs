//! One label, `user:role:type[:level]`, and the form of its parts. Pure.

use std::fmt;

use crate::base::security::SelinuxOptions;
use crate::runtime::spec::SpecError;

/// A label as the kernel writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    /// User.
    pub(crate) user: String,
    /// Role.
    pub(crate) role: String,
    /// Type.
    pub(crate) kind: String,
    /// Level or range of levels; empty: the policy has none.
    pub(crate) level: String,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.user, self.role, self.kind)?;
        match &*self.level {
            "" => Ok(()),
            level => write!(f, ":{level}"),
        }
    }
}

impl Label {
    /// The label that a text is; absent: it is none.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(4, ':');
        let mut next = || parts.next();
        let label = Self {
            user: next()?.to_owned(),
            role: next()?.to_owned(),
            kind: next()?.to_owned(),
            level: next().unwrap_or_default().to_owned(),
        };
        let names = [&label.user, &label.role, &label.kind];
        let fine = names.iter().all(|name| is_name(name));
        (fine && (label.level.is_empty() || is_level(&label.level))).then_some(label)
    }

    /// Replaces the parts that the options name.
    ///
    /// # Errors
    /// [`SpecError::Invalid`]: one has not the form of such a part.
    pub(super) fn apply(&mut self, field: &str, options: &SelinuxOptions) -> Result<(), SpecError> {
        for (name, given, part) in [
            ("user", &options.user, &mut self.user),
            ("role", &options.role, &mut self.role),
            ("type", &options.kind, &mut self.kind),
        ] {
            if given.is_empty() {
                continue;
            }
            if !is_name(given) {
                let problem = "is no name of a SELinux policy";
                let mend = "use letters, digits, `_`, `-` and `.`";
                return Err(SpecError::invalid(
                    format!("{field}.{name}"),
                    given,
                    problem,
                    mend,
                ));
            }
            part.clone_from(given);
        }
        if !options.level.is_empty() {
            if !is_level(&options.level) {
                let problem = "is no SELinux level";
                let mend = "use one such as s0, s0:c1,c2 or s0-s0:c0.c1023";
                return Err(SpecError::invalid(
                    format!("{field}.level"),
                    &options.level,
                    problem,
                    mend,
                ));
            }
            self.level.clone_from(&options.level);
        }
        Ok(())
    }

    /// Labels of an unconfined process with this type, the best first: with every category, with none, without a level.
    pub(super) fn unconfined(&self, kind: &str) -> Vec<String> {
        let of_level = |level: &str| {
            let label = Self {
                kind: kind.to_owned(),
                level: level.to_owned(),
                ..self.clone()
            };
            label.to_string()
        };
        match &*self.level {
            "" => vec![of_level("")],
            _ => vec![of_level("s0-s0:c0.c1023"), of_level("s0")],
        }
    }
}

fn is_name(text: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    !text.is_empty() && text.len() <= 255 && text.chars().all(fine)
}

/// Is it a level, or a range of two (`s0-s15:c0.c1023`), as the kernel reads it?
pub(super) fn is_level(text: &str) -> bool {
    let mut sides = text.splitn(2, '-');
    sides.all(|side| match side.split_once(':') {
        None => is_numbered(side, 's'),
        Some((sensitivity, categories)) => {
            is_numbered(sensitivity, 's') && categories.split(',').all(are_categories)
        }
    })
}

/// One category, or a range of them: `c3`, `c3.c7`.
fn are_categories(text: &str) -> bool {
    match text.split_once('.') {
        None => is_numbered(text, 'c'),
        Some((first, last)) => is_numbered(first, 'c') && is_numbered(last, 'c'),
    }
}

fn is_numbered(text: &str, letter: char) -> bool {
    let digits = text.strip_prefix(letter).unwrap_or_default();
    (1..=5).contains(&digits.len()) && digits.bytes().all(|digit| digit.is_ascii_digit())
}
