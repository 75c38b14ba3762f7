//! Tables: columns as wide as their widest cell, two spaces between them.

/// The lines of a table; the first row is the head.
pub(super) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            line.push_str(cell);
            let padding = width - cell.chars().count() + 2;
            line.extend(std::iter::repeat_n(' ', padding));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Bytes as people read them.
pub(super) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// How long ago, in its largest unit.
pub(super) fn age(now_ns: i64, then_ns: i64) -> String {
    let seconds = (now_ns - then_ns).max(0) / 1_000_000_000;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// An id as lists show it: 12 digits, without the name of its algorithm.
pub(super) fn short(id: &str) -> String {
    let digits = id.strip_prefix("sha256:").unwrap_or(id);
    digits.chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let row = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
        let text = table(&[row("NAME", "ID"), row("ä", "1"), row("long name", "22")]);
        assert_eq!(text, "NAME       ID\nä          1\nlong name  22\n");
    }

    #[test]
    fn ages() {
        let second = 1_000_000_000;
        assert_eq!(age(59 * second, 0), "59 s");
        assert_eq!(age(0, 5 * second), "0 s");
        assert_eq!(age(7200 * second, 0), "2 h");
        assert_eq!(age(200_000 * second, 0), "2 d");
    }
}
