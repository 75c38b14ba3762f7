//! A certificate of the server's own (RFC 5280), signed with its own key: ECDSA on P-256 with SHA-256.
//!
//! Nobody can vouch for it, so it has no end: its key goes with the daemon. A hundred lines of DER, for a crate that
//! makes certificates would bring ten others.

use std::net::IpAddr;

use ring::error::Unspecified;
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// Tags of DER (X.690).
const BOOLEAN: u8 = 0x01;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const OBJECT: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
/// A name and an address of `GeneralName`.
const DNS_NAME: u8 = 0x82;
const IP_ADDRESS: u8 = 0x87;
/// Version and extensions of `TBSCertificate`.
const VERSION: u8 = 0xa0;
const EXTENSIONS: u8 = 0xa3;

/// Object identifiers, encoded.
const ECDSA_WITH_SHA256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
const EC_PUBLIC_KEY: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
const P256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x0f];
const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];
const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];
const EXTENDED_KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x25];
const SERVER_AUTH: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01];

/// A certificate for these names and addresses, and its key (PKCS #8). What cannot be a name in a certificate is left out.
pub(super) fn make(
    names: &[&str],
    addresses: &[IpAddr],
) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), Unspecified> {
    let random = SystemRandom::new();
    let algorithm = &ECDSA_P256_SHA256_ASN1_SIGNING;
    let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random)?;
    let key = EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random)
        .map_err(|_own_key| Unspecified)?;
    let mut serial = [0; 16];
    random.fill(&mut serial)?;
    // Positive, and never with a zero in front, which DER forbids.
    serial[0] = serial[0] & 0x7f | 0x40;
    let signed_with = sequence(&[der(OBJECT, ECDSA_WITH_SHA256)]);
    let name = sequence(&[der(
        SET,
        &sequence(&[der(OBJECT, COMMON_NAME), der(UTF8_STRING, b"berth")]),
    )]);
    let validity = sequence(&[
        der(UTC_TIME, b"200101000000Z"),
        // RFC 5280, 4.1.2.5: no end.
        der(GENERALIZED_TIME, b"99991231235959Z"),
    ]);
    let public = sequence(&[
        sequence(&[der(OBJECT, EC_PUBLIC_KEY), der(OBJECT, P256)]),
        bits(key.public_key().as_ref()),
    ]);
    let to_be_signed = sequence(&[
        der(VERSION, &der(INTEGER, &[2])),
        der(INTEGER, &serial),
        signed_with.clone(),
        name.clone(),
        validity,
        name,
        public,
        der(EXTENSIONS, &extensions(names, addresses)),
    ]);
    let signature = key.sign(&random, &to_be_signed)?;
    let certificate = sequence(&[to_be_signed, signed_with, bits(signature.as_ref())]);
    let key = PrivatePkcs8KeyDer::from(document.as_ref().to_vec());
    Ok((certificate.into(), key.into()))
}

fn extensions(names: &[&str], addresses: &[IpAddr]) -> Vec<u8> {
    let names = names.iter().filter(|name| can_be_name(name));
    let names = names.map(|name| der(DNS_NAME, name.as_bytes()));
    let addresses = addresses.iter().map(|address| match address {
        IpAddr::V4(address) => der(IP_ADDRESS, &address.octets()),
        IpAddr::V6(address) => der(IP_ADDRESS, &address.octets()),
    });
    let all: Vec<_> = names.chain(addresses).collect();
    sequence(&[
        extension(SUBJECT_ALT_NAME, false, &sequence(&all)),
        // digitalSignature, the first of the bits; 7 of the byte are none.
        extension(KEY_USAGE, true, &der(BIT_STRING, &[7, 0x80])),
        extension(
            EXTENDED_KEY_USAGE,
            false,
            &sequence(&[der(OBJECT, SERVER_AUTH)]),
        ),
        // No authority: that is the default, so nothing is in it.
        extension(BASIC_CONSTRAINTS, true, &sequence(&[])),
    ])
}

fn can_be_name(name: &str) -> bool {
    let fine = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.');
    let ends = |c: char| c.is_ascii_alphanumeric();
    name.len() < 254 && name.bytes().all(fine) && name.starts_with(ends) && name.ends_with(ends)
}

fn extension(kind: &[u8], critical: bool, value: &[u8]) -> Vec<u8> {
    let mut parts = vec![der(OBJECT, kind)];
    if critical {
        parts.push(der(BOOLEAN, &[0xff]));
    }
    parts.push(der(OCTET_STRING, value));
    sequence(&parts)
}

/// Whole bytes as a string of bits.
fn bits(bytes: &[u8]) -> Vec<u8> {
    der(BIT_STRING, &[&[0], bytes].concat())
}

fn sequence(parts: &[Vec<u8>]) -> Vec<u8> {
    der(SEQUENCE, &parts.concat())
}

/// Tag, length (in its shortest form) and content.
pub(super) fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let first = length.iter().position(|byte| *byte != 0);
    let length = &length[first.unwrap_or(length.len() - 1)..];
    let mut out = vec![tag];
    if content.len() > 127 {
        // At most 8: the bytes of a usize.
        out.push(0x80 | u8::try_from(length.len()).unwrap_or(0));
    }
    out.extend_from_slice(length);
    out.extend_from_slice(content);
    out
}
