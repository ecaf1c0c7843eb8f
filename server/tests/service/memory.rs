//! `ReadMemory` and `WriteMemory`, over the demo machine in plain memory.

use pagewalk_proto::v1;
use pagewalk_proto::v1::memory_service_client::MemoryServiceClient;
use pagewalk_proto::v1::{read_memory_request, write_memory_request};
use tonic::{Code, Status};

use crate::bed::{Bed, from_plain, number, refusal};

async fn read(bed: &Bed, gva: u64, length: u64) -> Result<v1::ReadMemoryResponse, Status> {
    let at = number(gva).map(read_memory_request::At::Gva);
    ask(bed, v1::ReadMemoryRequest { at, length, ..Default::default() }).await
}

async fn read_physical(bed: &Bed, gpa: u64, length: u64) -> Result<v1::ReadMemoryResponse, Status> {
    let at = number(gpa).map(read_memory_request::At::Gpa);
    ask(bed, v1::ReadMemoryRequest { at, length, ..Default::default() }).await
}

async fn ask(bed: &Bed, request: v1::ReadMemoryRequest) -> Result<v1::ReadMemoryResponse, Status> {
    Ok(MemoryServiceClient::new(bed.channel.clone()).read_memory(request).await?.into_inner())
}

async fn write(bed: &Bed, gva: u64, data: &[u8]) -> Result<v1::WriteMemoryResponse, Status> {
    let at = number(gva).map(write_memory_request::At::Gva);
    let request = v1::WriteMemoryRequest { at, data: data.to_vec(), ..Default::default() };
    Ok(MemoryServiceClient::new(bed.channel.clone()).write_memory(request).await?.into_inner())
}

#[tokio::test]
async fn bytes_by_gva_are_those_of_its_gpa() {
    let bed = Bed::plain().await;
    let text = bed.landmark("kernel-text");
    let by_gva = read(&bed, text, 64).await.unwrap();
    let by_gpa = read_physical(&bed, 0x1_0000, 64).await.unwrap();
    assert_eq!((by_gva.data.len(), &by_gva.stop), (64, &None));
    assert_eq!(by_gva.data, by_gpa.data);
    // The guest's first instruction: mov rbx, imm64.
    assert_eq!(by_gva.data[..2], [0x48, 0xbb]);
    from_plain(by_gva.provenance.as_ref());

    // Across pages, from the middle of one into the middle of another.
    let long = read(&bed, text + 0xff0, 0x1020).await.unwrap();
    assert_eq!(long.data.len(), 0x1020);
    assert_eq!(long.data[0x10..0x20], read(&bed, text + 0x1000, 0x10).await.unwrap().data);
    bed.stop().await;
}

#[tokio::test]
async fn a_read_ends_where_memory_does_and_says_why() {
    let bed = Bed::plain().await;
    let absent = bed.landmark("not-present");
    // The page before it is there.
    let answer = read(&bed, absent - 8, 64).await.unwrap();
    let stop = answer.stop.unwrap();
    assert_eq!((answer.data.len(), stop.address), (8, absent));
    let fault = stop.fault.unwrap();
    assert_eq!((fault.kind(), fault.error_code, fault.level), (v1::FaultKind::PageFault, Some(0), 1));

    let device = read(&bed, bed.landmark("mmio") + 4, 8).await.unwrap();
    let stop = device.stop.unwrap();
    assert_eq!((device.data.len(), stop.address), (0, bed.landmark("mmio") + 4));
    assert!(stop.fault.is_none() && stop.gpa & 0xfff == 4 && stop.reason.contains("no memory"), "{stop:?}");

    let end = read_physical(&bed, (8 << 20) - 4, 64).await.unwrap();
    assert_eq!((end.data.len(), end.stop.unwrap().gpa), (4, 8 << 20));
    // As a debugger reads, rights do not matter; as a user reads, they do.
    let at = number(bed.landmark("kernel-data")).map(read_memory_request::At::Gva);
    let privilege = v1::Privilege::User.into();
    let user = v1::ReadMemoryRequest { at, length: 8, privilege, ..Default::default() };
    let refused = ask(&bed, user).await.unwrap();
    assert_eq!(refused.stop.unwrap().fault.unwrap().error_code, Some(5));
    bed.stop().await;
}

#[tokio::test]
async fn a_write_is_whole_or_not_at_all() {
    let bed = Bed::plain().await;
    let stack = bed.landmark("kernel-stack");
    let answer = write(&bed, stack + 8, &[1, 2, 3]).await.unwrap();
    assert_eq!((answer.written, answer.stop), (3, None));
    assert_eq!(read(&bed, stack + 7, 5).await.unwrap().data, [0, 1, 2, 3, 0]);

    // The last bytes would go to a page that is not there: the first ones stay as well.
    let absent = bed.landmark("not-present");
    let before = read(&bed, absent - 4, 4).await.unwrap().data;
    let answer = write(&bed, absent - 4, &[0xaa; 8]).await.unwrap();
    assert_eq!((answer.written, answer.stop.unwrap().address), (0, absent));
    assert_eq!(read(&bed, absent - 4, 4).await.unwrap().data, before);
    let rom = write(&bed, bed.landmark("rom"), &[0xaa]).await.unwrap();
    assert!(rom.written == 0 && rom.stop.unwrap().reason.contains("only be read"));
    bed.stop().await;
}

#[tokio::test]
async fn what_is_out_of_range_is_refused() {
    let bed = Bed::plain().await;
    for length in [0, (1 << 20) + 1, u64::MAX] {
        let refused = refusal(read(&bed, 0, length).await);
        assert_eq!(refused, (Code::InvalidArgument, "INVALID_FIELD".to_owned()), "{length}");
    }
    for data in [&[][..], &[0; (32 << 10) + 1]] {
        let refused = refusal(write(&bed, 0, data).await);
        assert_eq!(refused, (Code::InvalidArgument, "INVALID_FIELD".to_owned()));
    }
    assert_eq!(refusal(read(&bed, u64::MAX - 3, 8).await).0, Code::InvalidArgument);
    assert_eq!(refusal(read_physical(&bed, u64::MAX - 3, 8).await).0, Code::InvalidArgument);
    let nowhere = v1::ReadMemoryRequest { length: 1, ..Default::default() };
    assert_eq!(refusal(ask(&bed, nowhere).await).0, Code::InvalidArgument);
    // The last byte that there is can be asked for.
    let last = read(&bed, u64::MAX, 1).await.unwrap();
    assert_eq!((last.data.len(), last.stop.unwrap().address), (0, u64::MAX));
    bed.unharmed().await;
    bed.stop().await;
}
