//! Fields of tar headers: numbers, names, the records of PAX.

/// What a PAX header says about the next entry.
#[derive(Clone, Default)]
pub(crate) struct Pax {
    /// Path.
    pub(crate) path: Option<Vec<u8>>,
    /// Target of a link.
    pub(crate) link: Option<Vec<u8>>,
    /// Bytes of data.
    pub(crate) size: Option<u64>,
    /// Owner.
    pub(crate) uid: Option<u64>,
    /// Group.
    pub(crate) gid: Option<u64>,
    /// Seconds and nanoseconds.
    pub(crate) mtime: Option<(i64, i64)>,
    /// (name, value), in order.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Path of a sparse file.
    pub(crate) sparse_name: Option<Vec<u8>>,
    /// Size of a sparse file, holes included.
    pub(crate) sparse_size: Option<u64>,
    /// Version of the sparse form.
    pub(crate) sparse_major: Option<u64>,
    /// Version of the sparse form.
    pub(crate) sparse_minor: Option<u64>,
    /// Offset and length by turns.
    pub(crate) sparse_map: Vec<u64>,
    /// The next entry is sparse.
    pub(crate) sparse: bool,
}

impl Pax {
    /// Takes one record over; `None`: the value is malformed. An empty value deletes.
    pub(crate) fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let text = || (!value.is_empty()).then(|| value.to_vec());
        let number = || match value {
            b"" => Some(None),
            digits => decimal(digits).map(Some),
        };
        match key {
            b"path" => self.path = text(),
            b"linkpath" => self.link = text(),
            b"size" => self.size = number()?,
            b"uid" => self.uid = number()?,
            b"gid" => self.gid = number()?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.name" => self.sparse_name = text(),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                (self.sparse, self.sparse_size) = (true, number()?);
            }
            b"GNU.sparse.major" => (self.sparse, self.sparse_major) = (true, number()?),
            b"GNU.sparse.minor" => (self.sparse, self.sparse_minor) = (true, number()?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.sparse_map.push(decimal(value)?),
            b"GNU.sparse.map" => {
                let numbers: Option<Vec<_>> =
                    value.split(|byte| *byte == b',').map(decimal).collect();
                self.sparse_map = numbers?;
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    let name_ok = !name.is_empty() && name.len() <= 255 && !name.contains(&0);
                    self.xattrs
                        .push(name_ok.then(|| (name.to_vec(), value.to_vec()))?);
                }
            }
        }
        Some(())
    }
}

/// Is the sum of a header right, counted as either kind of byte?
pub(crate) fn checksum_ok(block: &[u8; 512]) -> bool {
    let (mut unsigned, mut signed) = (0i64, 0i64);
    for (at, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) {
            b' '
        } else {
            *byte
        };
        unsigned += i64::from(byte);
        signed += i64::from(byte.cast_signed());
    }
    let stated = number(&block[148..156]).and_then(|sum| i64::try_from(sum).ok());
    stated.is_some_and(|stated| stated == unsigned || stated == signed)
}

/// The path that the header itself holds.
pub(crate) fn header_path(header: &[u8; 512]) -> Vec<u8> {
    let name = until_nul(&header[..100]);
    let prefix = match &header[257..263] {
        b"ustar\0" => until_nul(&header[345..500]),
        _ => b"",
    };
    match prefix.is_empty() {
        true => name.to_vec(),
        false => [prefix, name].join(&b'/'),
    }
}

/// The text before the first NUL.
pub(crate) fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Octal text, or GNU's base-256 with the top bit set. Empty is 0, negative is none.
pub(crate) fn number(field: &[u8]) -> Option<u64> {
    signed_number(field).and_then(|number| u64::try_from(number).ok())
}

/// As [`number`], and negative ones.
pub(crate) fn signed_number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let mut value = if negative { -1i64 } else { 0 };
        for (at, byte) in field.iter().enumerate() {
            let byte = match (at, negative) {
                (0, false) => byte & 0x7f,
                _ => *byte,
            };
            value = value.checked_mul(256)?.checked_add(i64::from(byte))?;
        }
        return Some(value);
    }
    let digits = field.iter().skip_while(|byte| **byte == b' ');
    let mut value = 0i64;
    let mut ended = false;
    for byte in digits {
        match byte {
            b'0'..=b'7' if !ended => {
                value = value.checked_mul(8)?.checked_add(i64::from(byte - b'0'))?;
            }
            b' ' | 0 => ended = true,
            _ if ended => break,
            _ => return None,
        }
    }
    Some(value)
}

/// Digits only.
pub(crate) fn decimal(text: &[u8]) -> Option<u64> {
    match text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        true => None,
        false => std::str::from_utf8(text).ok()?.parse().ok(),
    }
}

/// `[-]seconds[.fraction]`.
fn time(text: &[u8]) -> Option<(i64, i64)> {
    let text = std::str::from_utf8(text).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let negative = seconds.starts_with('-');
    let mut seconds: i64 = seconds.parse().ok()?;
    let mut nanos: i64 = 0;
    for at in 0..9 {
        let digit = fraction.as_bytes().get(at).copied().unwrap_or(b'0');
        nanos = nanos * 10 + i64::from(digit.is_ascii_digit().then(|| digit - b'0')?);
    }
    if negative && nanos > 0 {
        seconds = seconds.checked_sub(1)?;
        nanos = 1_000_000_000 - nanos;
    }
    Some((seconds, nanos))
}

/// `length key=value\n` at the head of `bytes`: key, value and the length of it all.
pub(crate) fn pax_record(bytes: &[u8]) -> Option<(&[u8], &[u8], usize)> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let length = usize::try_from(decimal(&bytes[..space])?).ok()?;
    let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some((&record[..equals], &record[equals + 1..], length))
}
