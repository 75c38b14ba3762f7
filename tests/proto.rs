//! The compiled CRI interface against the facts of CRI v1, both ways: nothing missing, nothing invented.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a failed test may panic")]

use std::collections::BTreeSet;

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
    FileDescriptorSet,
};

const PACKAGE: &str = "runtime.v1";

/// The facts as they were gathered, and the enum that is nested in a message, which they leave out.
fn facts() -> BTreeSet<String> {
    const NESTED: [&str; 3] = [
        "enum ProfileType.RuntimeDefault = 0",
        "enum ProfileType.Unconfined = 1",
        "enum ProfileType.Localhost = 2",
    ];
    include_str!("fixtures/cri-v1-facts.txt")
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .chain(NESTED)
        .map(str::to_owned)
        .collect()
}

fn files() -> FileDescriptorSet {
    let bytes: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
    prost::Message::decode(bytes).unwrap()
}

fn cri(files: &FileDescriptorSet) -> &FileDescriptorProto {
    let file = files.file.iter().find(|file| file.package() == PACKAGE);
    file.unwrap()
}

/// The last part of a full name.
fn bare(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

fn compiled() -> BTreeSet<String> {
    let files = files();
    let file = cri(&files);
    let mut out = BTreeSet::new();
    for service in &file.service {
        for method in &service.method {
            assert!(!method.client_streaming(), "{}", method.name());
            let stream = if method.server_streaming() {
                "stream "
            } else {
                ""
            };
            out.insert(format!(
                "rpc {}.{}: {} -> {stream}{}",
                service.name(),
                method.name(),
                bare(method.input_type()),
                bare(method.output_type()),
            ));
        }
    }
    for message in &file.message_type {
        add_message(message, &mut out);
    }
    for one in &file.enum_type {
        add_enum(one, &mut out);
    }
    out
}

fn add_enum(one: &EnumDescriptorProto, out: &mut BTreeSet<String>) {
    for value in &one.value {
        out.insert(format!(
            "enum {}.{} = {}",
            one.name(),
            value.name(),
            value.number()
        ));
    }
}

fn add_message(message: &DescriptorProto, out: &mut BTreeSet<String>) {
    if message.field.is_empty() {
        out.insert(format!("message {}: (empty)", message.name()));
    }
    for field in &message.field {
        let deprecated = field.options.as_ref().is_some_and(|o| o.deprecated());
        out.insert(format!(
            "message {}.{} = {}: {}{}",
            message.name(),
            field.name(),
            field.number(),
            kind(message, field),
            if deprecated { " deprecated" } else { "" },
        ));
    }
    for one in &message.enum_type {
        add_enum(one, out);
    }
}

fn kind(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let entry = message
        .nested_type
        .iter()
        .find(|nested| bare(field.type_name()) == nested.name());
    if let Some(entry) = entry.filter(|e| e.options.as_ref().is_some_and(|o| o.map_entry())) {
        let part = |n: usize| kind(entry, &entry.field[n]);
        return format!("map<{},{}>", part(0), part(1));
    }
    let kind = match field.r#type() {
        Type::Message | Type::Enum => bare(field.type_name()),
        Type::String => "string",
        Type::Bytes => "bytes",
        Type::Bool => "bool",
        Type::Double => "double",
        Type::Int32 => "int32",
        Type::Int64 => "int64",
        Type::Uint32 => "uint32",
        Type::Uint64 => "uint64",
        other => panic!("{}: a type that CRI does not use: {other:?}", field.name()),
    };
    match field.label() {
        Label::Repeated => format!("repeated {kind}"),
        _ => kind.to_owned(),
    }
}

#[test]
fn the_interface_is_cri_v1() {
    let (facts, compiled) = (facts(), compiled());
    let missing: Vec<_> = facts.difference(&compiled).collect();
    let invented: Vec<_> = compiled.difference(&facts).collect();
    assert!(
        missing.is_empty() && invented.is_empty(),
        "missing: {missing:#?}\ninvented: {invented:#?}"
    );
}

/// Every service, rpc, message and enum says what it is for.
#[test]
fn everything_is_described() {
    let text = std::fs::read_to_string("proto/runtime/v1/api.proto").unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let mut bare = vec![];
    for (n, line) in lines.iter().enumerate() {
        let word = line.split_whitespace().next().unwrap_or_default();
        if matches!(word, "service" | "rpc" | "message" | "enum")
            && !lines[n.saturating_sub(1)].trim_start().starts_with("//")
        {
            bare.push(format!("line {}: {}", n + 1, line.trim()));
        }
    }
    assert!(bare.is_empty(), "no comment above\n{}", bare.join("\n"));
}
