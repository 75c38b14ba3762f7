//! Numbers as Kubernetes writes them: `1500`, `1.5k`, `10M`, `4Gi`, `2e6`.

/// The number, rounded up; absent: it is none, negative or too large for 64 bits.
pub(super) fn parse(text: &str) -> Option<u64> {
    let text = text.strip_prefix('+').unwrap_or(text);
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, suffix) = text.split_at(end.unwrap_or(text.len()));
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    let digits = format!("0{whole}{fraction}").parse::<u128>().ok()?;
    let (up, down) = scale(suffix)?;
    let down = down.checked_mul(10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?)?;
    u64::try_from(digits.checked_mul(up)?.div_ceil(down)).ok()
}

/// What a suffix multiplies by, and what it divides by.
fn scale(suffix: &str) -> Option<(u128, u128)> {
    let thousands = |power| 1000_u128.pow(power);
    let binary = |power: u32| 1_u128 << (10 * power);
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, thousands(3)),
        "u" => (1, thousands(2)),
        "m" => (1, thousands(1)),
        "k" => (thousands(1), 1),
        "M" => (thousands(2), 1),
        "G" => (thousands(3), 1),
        "T" => (thousands(4), 1),
        "P" => (thousands(5), 1),
        "E" => (thousands(6), 1),
        "Ki" => (binary(1), 1),
        "Mi" => (binary(2), 1),
        "Gi" => (binary(3), 1),
        "Ti" => (binary(4), 1),
        "Pi" => (binary(5), 1),
        "Ei" => (binary(6), 1),
        exponent => {
            let power: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let scale = 10_u128.checked_pow(power.unsigned_abs())?;
            if power < 0 { (1, scale) } else { (scale, 1) }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn numbers() {
        for (text, number) in [
            ("0", 0),
            ("80", 80),
            ("+7", 7),
            ("10k", 10_000),
            ("1.5k", 1500),
            (".5M", 500_000),
            ("2.", 2),
            ("50M", 50_000_000),
            ("1G", 1_000_000_000),
            ("4Ki", 4096),
            ("1Gi", 1 << 30),
            ("2e6", 2_000_000),
            ("2E3", 2000),
            ("1500m", 2),
            ("0.0001", 1),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Some(number), "{text}");
        }
        for text in [
            "", ".", "k", "-1", "1K", "1 M", "1.2.3", "0x10", "1ki", "1e", "1e99", "20E", "M1",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
