//! A directory of records, one JSON file each.

use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::store::directory as make_directory;
use crate::store::{CLOSED, Durability, Result, StoreError, file_error, write_atomic};

/// Records of type `T` in one directory, by key. The key becomes a file name: an id, never user input.
#[derive(Debug)]
pub(crate) struct Records<T> {
    directory: PathBuf,
    format: u32,
    of: PhantomData<fn() -> T>,
}

/// What [`Records::load_all`] found.
#[derive(Debug)]
pub(crate) struct Loaded<T> {
    /// (key, record), by key.
    pub(crate) records: Vec<(String, T)>,
    /// Files that were set aside, (where they are now, what was wrong).
    pub(crate) corrupt: Vec<(PathBuf, String)>,
}

/// First line of a record's file.
#[derive(Serialize, Deserialize)]
struct Header {
    format: u32,
    checksum: String,
}

const SUFFIX: &str = ".json";

impl<T: Serialize + DeserializeOwned> Records<T> {
    /// Opens the directory, making it if missing. `format` is what [`Records::put`] writes and the
    /// newest that can be read.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub(crate) fn open(directory: impl Into<PathBuf>, format: u32) -> Result<Self> {
        let directory = directory.into();
        make_directory(&directory, CLOSED)?;
        Ok(Self {
            directory,
            format,
            of: PhantomData,
        })
    }

    /// Reads every record, before anybody writes or removes one. Files half written by a crash are deleted, corrupt ones moved
    /// aside and reported: neither is fatal. Blocks on the disk.
    ///
    /// # Errors
    /// [`StoreError::Newer`]: a newer version wrote one. [`StoreError::File`]: the directory or one of
    /// its files cannot be read.
    pub(crate) fn load_all(&self) -> Result<Loaded<T>> {
        let mut loaded = Loaded {
            records: vec![],
            corrupt: vec![],
        };
        let unreadable = || file_error("read", &self.directory);
        for entry in std::fs::read_dir(&self.directory).map_err(unreadable())? {
            let path = entry.map_err(unreadable())?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with('.') && name.ends_with(".new") {
                std::fs::remove_file(&path).map_err(file_error("remove", &path))?;
                continue;
            }
            let Some(key) = name.strip_suffix(SUFFIX) else {
                continue;
            };
            let key = key.to_owned();
            let content = std::fs::read(&path).map_err(file_error("read", &path))?;
            match self.decode(&path, &content)? {
                Ok(record) => loaded.records.push((key, record)),
                Err(why) => {
                    let aside = path.with_file_name(format!("{key}{SUFFIX}.corrupt"));
                    std::fs::rename(&path, &aside).map_err(file_error("rename", &path))?;
                    loaded.corrupt.push((aside, why));
                }
            }
        }
        loaded.records.sort_by(|a, b| a.0.cmp(&b.0));
        loaded.corrupt.sort();
        Ok(loaded)
    }

    /// Writes a record in place of the one before. Blocks on the disk.
    ///
    /// # Errors
    /// [`StoreError::File`], [`StoreError::Encode`]; the record before is untouched then.
    pub(crate) fn put(&self, key: &str, record: &T, durability: Durability) -> Result<()> {
        let path = self.path(key);
        let encode_error = |source| StoreError::Encode {
            path: path.clone(),
            source,
        };
        let body = serde_json::to_vec(record).map_err(encode_error)?;
        let header = Header {
            format: self.format,
            checksum: checksum(&body),
        };
        let mut content = serde_json::to_vec(&header).map_err(encode_error)?;
        content.reserve(body.len() + 2);
        content.push(b'\n');
        content.extend_from_slice(&body);
        content.push(b'\n');
        write_atomic(&path, &content, 0o600, durability)
    }

    /// Deletes a record; one that is not there is fine.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub(crate) fn remove(&self, key: &str) -> Result<()> {
        let path = self.path(key);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(file_error("remove", &path)(error))
            }
            _ => Ok(()),
        }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.directory.join(format!("{key}{SUFFIX}"))
    }

    /// The record, or what is wrong with it.
    fn decode(&self, path: &Path, content: &[u8]) -> Result<std::result::Result<T, String>> {
        let mut lines = content.splitn(2, |byte| *byte == b'\n');
        let (first, body) = (lines.next().unwrap_or_default(), lines.next());
        let header: Header = match serde_json::from_slice(first) {
            Ok(header) => header,
            Err(error) => return Ok(Err(format!("no header: {error}"))),
        };
        if header.format > self.format {
            return Err(StoreError::Newer {
                path: path.to_owned(),
                found: header.format,
                known: self.format,
            });
        }
        let body = body.and_then(|body| body.strip_suffix(b"\n"));
        let Some(body) = body.filter(|body| checksum(body) == header.checksum) else {
            return Ok(Err("the checksum does not match".to_owned()));
        };
        Ok(serde_json::from_slice(body).map_err(|error| error.to_string()))
    }
}

fn checksum(body: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(16);
    for byte in Sha256::digest(body).iter().take(8) {
        let _written: std::fmt::Result = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn open(directory: &Path) -> Records<Vec<String>> {
        Records::open(directory.join("records"), 3).unwrap()
    }

    fn text(value: &str) -> Vec<String> {
        vec![value.to_owned(); 3]
    }

    #[test]
    fn put_load_remove() {
        let directory = tempfile::tempdir().unwrap();
        let records = open(directory.path());
        records.put("b", &text("1"), Durability::Process).unwrap();
        records.put("a", &text("2"), Durability::Durable).unwrap();
        records.put("b", &text("3"), Durability::Process).unwrap();
        let loaded = open(directory.path()).load_all().unwrap();
        assert_eq!(
            loaded.records,
            [("a".to_owned(), text("2")), ("b".to_owned(), text("3"))]
        );
        records.remove("a").unwrap();
        records.remove("a").unwrap();
        assert_eq!(records.load_all().unwrap().records.len(), 1);
    }

    #[test]
    fn a_crash_before_the_rename_leaves_the_old_record() {
        let directory = tempfile::tempdir().unwrap();
        let records = open(directory.path());
        records.put("a", &text("old"), Durability::Process).unwrap();
        let beside = crate::store::name_beside(&records.path("a"));
        crate::store::write_beside(&beside, b"{\"format\":3,", 0o600, Durability::Process).unwrap();
        let loaded = records.load_all().unwrap();
        assert_eq!(loaded.records, [("a".to_owned(), text("old"))]);
        assert!(loaded.corrupt.is_empty());
        assert!(!beside.exists());
    }

    #[test]
    fn a_newer_format_is_refused_with_text() {
        let directory = tempfile::tempdir().unwrap();
        let newer: Records<u8> = Records::open(directory.path().join("records"), 4).unwrap();
        newer.put("a", &1, Durability::Process).unwrap();
        let error = open(directory.path()).load_all().unwrap_err().to_string();
        assert!(
            error.contains("format 4") && error.contains("up to 3"),
            "{error}"
        );
        assert!(newer.path("a").exists());
    }

    proptest! {
        /// However a file is damaged, the load goes on, the others are read, and no wrong value comes out.
        #[test]
        fn damage_is_found(cut in 0usize..200, flip in proptest::option::of((0usize..200, 1u8..))) {
            let directory = tempfile::tempdir().unwrap();
            let records = open(directory.path());
            records.put("good", &text("good"), Durability::Process).unwrap();
            records.put("bad", &text("some text of a record"), Durability::Process).unwrap();
            let path = records.path("bad");
            let whole = std::fs::read(&path).unwrap();
            let mut content = whole.clone();
            content.truncate(cut.min(content.len()));
            if let Some((at, bits)) = flip
                && let Some(byte) = content.get_mut(at)
            {
                *byte ^= bits;
            }
            write_atomic(&path, &content, 0o600, Durability::Process).unwrap();
            match records.load_all() {
                Ok(loaded) => {
                    let bad = loaded.records.iter().find(|(key, _)| key == "bad");
                    if let Some((_, value)) = bad {
                        prop_assert_eq!(value, &text("some text of a record"));
                    } else {
                        prop_assert_eq!(loaded.corrupt.len(), 1);
                    }
                    prop_assert!(loaded.records.iter().any(|(key, _)| key == "good"));
                }
                // A flipped digit of the format can make it a newer one.
                Err(StoreError::Newer { .. }) => prop_assert!(flip.is_some()),
                Err(error) => prop_assert!(false, "{error}"),
            }
        }
    }
}
